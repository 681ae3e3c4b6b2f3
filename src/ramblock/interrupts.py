# SPDX-License-Identifier: Apache-2.0
"""
Interrupts wait: nothing of ours is left half-way by Ctrl-C.

CPython runs a signal's handler on the main thread, between any two bytecodes, and what the handler
raises comes out there. No undo can be written against that, so an operation holds back the handlers
of SIGINT and SIGTERM and hands over what came when it has ended, done or put back. (trio protects its
own code likewise, and says in trio/_core/_ki.py why arbitrary bytecodes are the wrong place.)

Nothing is lost: a handler is called once for each time that Python would have called it, in order.
If several raise, the last exception leaves, with the ones before it as its context.

An operation that never ends (a target that hangs) can still be killed: when a signal has waited for
:data:`PATIENCE_SECONDS`, the next one ends the process as the kernel does by default. SIGQUIT (Ctrl-\\)
and SIGKILL are not held back at all.
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

#: How long a signal waits before another one may end the process. Longer than any operation that
#: works takes on one piece of memory; short enough for somebody at a terminal.
PATIENCE_SECONDS: Final = 10.0

# A handler that is no Python function (the kernel's default, or "ignore") raises nothing.
_HELD_BACK = (_signal.SIGINT, _signal.SIGTERM)

_main = main_thread().ident


def _find_main_thread() -> None:
    global _main
    _main = get_ident()  # a fork has one thread, whichever it was before


os.register_at_fork(after_in_child=_find_main_thread)


class _Hold:
    """Stands in for the handlers while one operation runs."""

    # Defaults of the class: it is made for each operation, and nearly always nothing comes.
    handlers: dict[int, Callable[..., Any]]
    outer: _Hold | None = None
    since = 0.0
    waiting: list[tuple[int, FrameType | None]] | None = None
    over = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Be the handler: let it wait."""
        if self.over:
            # Whoever put the handlers back was struck in between, and left this one.
            _signal.signal(number, self.handlers[number])
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
        """Call the handlers of all that waits. They still cannot strike in between."""
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
    Call ``work(*arguments)``; signals that come meanwhile are handled when it has returned or raised.

    Off the main thread there is nothing to hold back.

    :raises BaseException: Also what a handler raises, behind the work: then its result is lost to the
        caller, and an exception of its own is the context.
    """
    if get_ident() != _main:
        return work(*arguments)
    global _hold
    hold = _Hold()
    hold.handlers = handlers = {}
    try:
        for number in _HELD_BACK:
            handler = _signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                _signal.signal(number, hold.note)
        hold.outer = _hold
        _hold = hold
        return work(*arguments)
    finally:
        try:
            while hold.waiting:
                hold.hand_over()
        finally:
            # CPython looks for signals behind calls and at jumps back: there is neither between the
            # last look at what waits and this line, so none is noted behind it and forgotten.
            hold.over = True
            if _hold is hold:
                _hold = hold.outer
            for number, handler in handlers.items():
                _signal.signal(number, handler)


def hand_over() -> None:
    """
    Handle what waits now, in the middle of an operation that can be left here.

    :raises BaseException: What a handler raises.
    """
    if _hold is not None and get_ident() == _main and _hold.waiting:
        _hold.hand_over()
