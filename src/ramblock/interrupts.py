# SPDX-License-Identifier: Apache-2.0
"""
Interrupts wait: nothing of ours is left half-way by Ctrl-C.

CPython runs a signal's handler on the main thread, between any two bytecodes, and an exception of
the handler comes out there. No undo can be written against that (trio/_core/_ki.py says why), so an
operation holds back the handlers of SIGINT and SIGTERM and hands over at its end, done or put back.
Each is called as often as Python would have called it, in order. If several raise, the last
exception leaves, with the ones before it as its context.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the calls of `signal` without its enums
import os
import time
from _thread import get_ident
from collections.abc import Callable
from threading import main_thread
from types import FrameType
from typing import Any, Final, TypeVar

__all__ = ["PATIENCE_SECONDS", "hand_over", "uninterrupted"]

T = TypeVar("T")

#: When a signal has waited for so long, the next one ends the process as the kernel does by
#: default: an operation may never end (a target that hangs). Longer than any operation that works
#: takes on one piece of memory, short enough for a terminal. SIGQUIT and SIGKILL never wait.
PATIENCE_SECONDS: Final = 10.0

_HELD_BACK = (_signal.SIGINT, _signal.SIGTERM)

_main = main_thread().ident


def _find_main_thread() -> None:
    global _main, _hold
    if get_ident() != _main:
        # The operation of the thread that is not here never ends: nobody would hand over.
        while _hold is not None:
            for number, handler in _hold.handlers.items():
                _signal.signal(number, handler)
            _hold = _hold.outer
    _main = get_ident()  # a fork has one thread, whichever it was before


os.register_at_fork(after_in_child=_find_main_thread)


class _Hold:
    # Stands in for the handlers while one operation runs. Defaults of the class: it is made for
    # each operation, and nearly always no signal comes.
    handlers: dict[int, Callable[..., Any]]
    outer: _Hold | None = None
    since = 0.0
    waiting: list[tuple[int, FrameType | None]] | None = None
    over = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            # A signal struck while the handlers were put back, and left this one in place.
            for other, handler in self.handlers.items():
                if _signal.getsignal(other) == self.note:
                    _signal.signal(other, handler)
            self.handlers[number](number, frame)
            return
        now = time.monotonic()
        if not self.waiting:
            self.since = now
            self.waiting = []
        elif now - self.since >= PATIENCE_SECONDS:
            _signal.signal(number, _signal.SIG_DFL)
            _signal.raise_signal(number)
        self.waiting.append((number, frame))

    def hand_over(self) -> None:
        # Signals that come meanwhile wait too, and get their turn here.
        error: BaseException | None = None
        while self.waiting:
            number, frame = self.waiting.pop(0)
            try:
                self.handlers[number](number, frame)
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


_hold: _Hold | None = None


def uninterrupted(work: Callable[..., T], *arguments: object) -> T:
    """
    Call ``work(*arguments)``; signals meanwhile are handled when it has returned or raised.

    Off the main thread there is nothing to hold back.

    :raises BaseException: Also from a handler, behind the work: then the caller does not get the
        work's result, and an exception of the work is the context.
    """
    if get_ident() != _main:
        return work(*arguments)
    global _hold
    hold = _Hold()
    hold.handlers = handlers = {}
    note = hold.note
    try:
        for number in _HELD_BACK:
            handler = _signal.getsignal(number)
            if callable(handler):  # else the kernel's default, or "ignore": raises nothing
                handlers[number] = handler
                _signal.signal(number, note)
        hold.outer = _hold
        _hold = hold
        return work(*arguments)
    finally:
        try:
            while hold.waiting:
                hold.hand_over()
        finally:
            # CPython looks for signals behind calls and at jumps back. There is neither between the
            # last look at `waiting` and this line, so none is noted behind it and forgotten.
            hold.over = True
            if _hold is hold:
                _hold = hold.outer
            for number, handler in handlers.items():
                found = _signal.signal(number, handler)
                if found is not note:  # a handler has set another one
                    _signal.signal(number, found)


def hand_over() -> None:
    """Handle the waiting signals in an operation that can be left here; a handler may raise."""
    if _hold is not None and get_ident() == _main and _hold.waiting:
        _hold.hand_over()
