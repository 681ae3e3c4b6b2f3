# SPDX-License-Identifier: Apache-2.0
"""
What one guest memory and its blocks have in common: the lock, the poison, who needs discards.

A block has a guard of its own until it is placed; then it takes the memory's, so that one lock covers
convert, state changes, plug, sources, attach and map. Targets have locks of their own, always taken
after this one, and no target, device or socket thread ever takes this one: that is why there is no
deadlock to think about.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock, get_ident
from typing import NamedTuple, Protocol, TypeVar

from ramblock import process
from ramblock.discard.coordination import DiscardCoordinator, DiscardHold
from ramblock.discard.section import Block, RamSection
from ramblock.errors import BusyError, PoisonedError, describe_range
from ramblock.events import Observer, StateChanged
from ramblock.interrupts import uninterrupted

__all__ = ["Guard", "Home", "InDoubt", "MovedError"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class InDoubt(NamedTuple):
    """A range where a target may reach what is not populated, or not reach what is."""

    gpa: int
    """Guest physical address, in bytes."""
    size: int
    """In bytes."""
    target: object
    """The DMA target; for a listener that is no mapper, the listener."""


class MovedError(Exception):
    """A block came under another guard while a thread waited for this one's lock."""


class Home(Protocol):
    """Stands for a block: it is under a guard, which can change."""

    guard: Guard


class Guard:
    """The lock, the poison and the coordination of discards of one memory, or of one loose block."""

    def __init__(self) -> None:
        self._process = process.current
        self._owner: int | None = None
        self._operation = ""
        # Whoever comes while the lock is taken waits at a gate of its own, and is let in in turn. A
        # bare Lock goes to whichever thread runs next, which is often the one that has just given it
        # back: of eight threads that shared a guest, one waited a second.
        self._lock = Lock()
        self._gates: deque[Lock] = deque()
        self._reason: str | None = None
        self._doubts: list[tuple[RamSection, object]] = []
        #: How many doubts were ever noted.
        self.doubt_count = 0
        self.discards = DiscardCoordinator()
        self.observer: Observer | None = None

    # -- the lock ---------------------------------------------------------------------------------

    def run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
        home: Home | None = None,
    ) -> T:
        """
        Call ``work(*arguments)`` with the lock held. Interrupts wait until that has ended.

        :param operation: For messages.
        :param even_poisoned: For what only takes away.
        :param home: Has to be under this guard still when the lock is held.
        :raises BusyError: This thread holds the lock: a listener, source or target called back in.
        :raises UsageError: This process is a fork of the one that made the memory.
        :raises PoisonedError: Unless *even_poisoned*.
        :raises MovedError: *home* is under another guard by now. In each case nothing was called.
        """
        if self._process != process.current:
            process.refuse_fork(operation)
        if self._owner == get_ident():
            raise BusyError(
                f"{operation} was called from inside {self._operation}, which holds the memory's lock"
            )
        result: T = uninterrupted(
            self._run_locked, operation, work, arguments, even_poisoned, home
        )
        return result

    def _run_locked(
        self,
        operation: str,
        work: Callable[..., T],
        arguments: tuple[object, ...],
        even_poisoned: object,
        home: Home | None,
    ) -> T:
        if self._gates or not self._lock.acquire(blocking=False):
            self._wait()
        try:
            self._owner = get_ident()
            self._operation = operation
            if home is not None and home.guard is not self:
                raise MovedError
            if self._reason is not None and not even_poisoned:
                raise self.poisoned_error(operation)
            return work(*arguments)
        finally:
            self._owner = None
            if self._gates:
                self._gates.popleft().release()
            else:
                self._lock.release()
                if self._gates:
                    # Somebody came between that look and the release, and saw the lock taken.
                    self._open_a_gate()

    def _wait(self) -> None:
        """Take the lock in turn."""
        gate = Lock()
        gate.acquire()
        self._gates.append(gate)
        # Whoever had the lock may have given it back before it could see the gate.
        self._open_a_gate()
        gate.acquire()

    def _open_a_gate(self) -> None:
        """Let the next one in, unless the lock is taken: then its owner will."""
        while self._gates and self._lock.acquire(blocking=False):
            # With the lock held nobody else opens gates.
            if self._gates:
                self._gates.popleft().release()
                return
            self._lock.release()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that made the memory."""
        return self._process != process.current

    # -- the poison -------------------------------------------------------------------------------

    @property
    def poisoned(self) -> bool:
        """Whether something was left in a state that is not known. Never goes back to False."""
        return self._reason is not None

    def poison(self, reason: str) -> None:
        """Poison; the first reason is the one that is kept."""
        first = self._reason is None
        if first:
            self._reason = reason
        # Those after the first can be many; in_doubt() has them.
        _log.log(logging.CRITICAL if first else logging.DEBUG, "poisoned: %s", reason)

    def poisoned_error(self, operation: str) -> PoisonedError:
        """Build the error that every changing call raises from now on."""
        text = f"{operation}: the memory is poisoned: {self._reason}"
        return PoisonedError(text, step="poisoned")

    def doubt(self, section: RamSection, listener: object, reason: str) -> None:
        """Poison: *listener*, or the target it drives, may or may not still reach *section*."""
        self._doubts.append((section, getattr(listener, "target", listener)))
        self.doubt_count += 1
        where = describe_range(section.gpa, section.size)
        self.poison(f"{where} of block {section.block.name!r}: {reason}")

    def doubted_since(self, count: int, block: Block, start: int, end: int) -> bool:
        """Whether [start, end) of *block* came into doubt since *count* doubts were noted."""
        return any(
            section.block is block and section.offset < end and start < section.end
            for section, _ in self._doubts[count:]
        )

    def doubts_of(self, block: Block) -> list[object]:
        """List the targets that may still reach a page of *block*."""
        return [target for section, target in self._doubts if section.block is block]

    def in_doubt(self) -> list[InDoubt]:
        """List the doubts by target, ascending, without overlaps."""
        by_target: dict[int, tuple[object, list[tuple[int, int]]]] = {}
        for section, target in list(self._doubts):  # another thread may add some
            _, ranges = by_target.setdefault(id(target), (target, []))
            ranges.append((section.gpa, section.gpa_end))
        result: list[InDoubt] = []
        for target, ranges in by_target.values():
            start, end = min(ranges)
            for low, high in sorted(ranges):
                if low > end:
                    result.append(InDoubt(start, end - start, target))
                    start = low
                end = max(end, high)
            result.append(InDoubt(start, end - start, target))
        return result

    # -- blocks that come and go ------------------------------------------------------------------

    def leave_with(self, other: Guard, block: Block, holds: list[DiscardHold]) -> None:
        """Give a block that goes to *other* its own: *holds*, doubts, and the poison."""
        self.discards.give_back(other.discards, holds)
        other._doubts = [doubt for doubt in self._doubts if doubt[0].block is block]
        other.doubt_count = len(other._doubts)
        other._reason = self._reason

    def observe(self, event: StateChanged) -> None:
        """Hand *event* to the observer, if there is one."""
        if self.observer is not None:
            try:
                self.observer(event)
            except Exception:
                _log.exception("the observer failed on %r", event)
