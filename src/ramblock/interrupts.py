# SPDX-License-Identifier: Apache-2.0
"""
Interrupts wait: nothing of ours is left half-way by Ctrl-C.

CPython runs a signal's handler on the main thread, between any two bytecodes, and an exception of
the handler comes out there. No undo can be written against that (trio/_core/_ki.py says why), so an
operation holds back the handlers of SIGINT and SIGTERM and hands over at its end, done or put back.
Each is called as often as Python would have called it, in order. If several raise, the last
exception leaves, with the ones before it as its context.

Between operations the handlers are the application's own: asyncio, for one, looks whether they are.
"""

from __future__ import annotations

import os
import time
from _signal import (  # type: ignore[import-not-found]  # the calls of `signal` without its enums
    SIG_DFL,
    SIGINT,
    SIGTERM,
    getsignal,
    raise_signal,
    signal,
)
from _thread import get_ident
from collections.abc import Callable
from threading import main_thread
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: When a signal has waited for so long, the next one ends the process as the kernel does by
#: default: an operation may never end (a target that hangs). Longer than any operation that works
#: takes on one piece of memory, short enough for a terminal. SIGQUIT and SIGKILL never wait.
PATIENCE_SECONDS: Final = 10.0

_main = main_thread().ident

# All of this is the main thread's alone. How many operations it is in, one inside the other; the
# handlers that _note() stands in for, or stood in for last time; the signals that wait, with the
# time since when.
_depth = 0
_handlers: dict[int, Callable[..., Any]] = {}
_waiting: list[tuple[int, FrameType | None]] = []
_since = 0.0


def _note(number: int, frame: FrameType | None) -> None:
    global _since
    if not _depth:
        # A signal struck while the handlers were put back, and left this one in place.
        _put_back_all()
        _handlers[number](number, frame)
        return
    now = time.monotonic()
    if not _waiting:
        _since = now
    elif now - _since >= PATIENCE_SECONDS:
        signal(number, SIG_DFL)
        raise_signal(number)
    _waiting.append((number, frame))


def _put_back_all() -> None:
    for number, handler in _handlers.items():
        if getsignal(number) is _note:
            signal(number, handler)


def _find_main_thread() -> None:
    global _main, _depth
    if get_ident() != _main:
        # The operation of the thread that is not here never ends: nobody would hand over.
        _put_back_all()
        _waiting.clear()
        _depth = 0
    _main = get_ident()  # a fork has one thread, whichever it was before


os.register_at_fork(after_in_child=_find_main_thread)


def _hand_over() -> None:
    # Signals that come meanwhile wait too, and get their turn here.
    error: BaseException | None = None
    while _waiting:
        number, frame = _waiting.pop(0)
        try:
            _handlers[number](number, frame)
        except BaseException as raised:
            raised.__context__ = error or raised.__context__
            error = raised
    if error is None:
        return
    context = error.__context__
    try:
        raise error
    except BaseException:
        # To raise is to make the error of the work the context, and the signals before this one
        # would be lost. (contextlib.ExitStack does the same.)
        error.__context__ = context
        raise


def uninterrupted(work: Callable[..., T], *arguments: object) -> T:
    """
    Call ``work(*arguments)``; signals meanwhile are handled when it has returned or raised.

    Off the main thread there is nothing to hold back.

    :raises BaseException: Also from a handler, behind the work: then the caller does not get the
        work's result, and an exception of the work is the context.
    """
    global _depth
    if get_ident() != _main:
        return work(*arguments)
    if _depth:
        _depth += 1
        try:
            return work(*arguments)
        finally:
            _depth -= 1
    # For each signal the same lines: a loop over two is a tenth of all this. A handler that is not
    # callable is the kernel's default, or "ignore": it raises nothing.
    interrupt = terminate = False
    _depth = 1
    try:
        handler = getsignal(SIGINT)
        if callable(handler):
            if handler is not _note:
                _handlers[SIGINT] = handler
            interrupt = True
            signal(SIGINT, _note)
        handler = getsignal(SIGTERM)
        if handler is not SIG_DFL and callable(handler):
            if handler is not _note:
                _handlers[SIGTERM] = handler
            terminate = True
            signal(SIGTERM, _note)
        return work(*arguments)
    finally:
        try:
            while _waiting:
                _hand_over()
        finally:
            # CPython looks for signals behind calls and at jumps back. There is neither between the
            # last look at `_waiting` and this line, so none is noted behind it and forgotten.
            _depth = 0
            if interrupt:
                _restore(SIGINT)
            if terminate:
                _restore(SIGTERM)


def _restore(number: int) -> None:
    found = signal(number, _handlers[number])
    if found is not _note:  # a handler has set another one
        signal(number, found)


def hand_over() -> None:
    """Handle the waiting signals in an operation that can be left here; a handler may raise."""
    if _waiting and _depth == 1 and get_ident() == _main:
        _hand_over()
