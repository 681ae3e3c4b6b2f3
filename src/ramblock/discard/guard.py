# SPDX-License-Identifier: Apache-2.0
"""
The lock, the poison and the claims on discards that one guest memory and its blocks have in common.

A block has a guard of its own until it is placed; then it takes the memory's, so that one lock
covers convert, state changes, plug, sources, attach and map. Locks of
targets are always taken after this one, and no target, device or socket thread takes it. The lock
of a memory is never taken inside that of a block without a place: a listener calls no change.
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
from ramblock.events import Observer
from ramblock.interrupts import uninterrupted
from ramblock.ranges import merge

_log = logging.getLogger(__name__)

T = TypeVar("T")


class InDoubt(NamedTuple):
    """A range of the guest where a target may reach discarded pages, or miss populated ones."""

    gpa: int  #: Guest physical address, in bytes, like the size.
    size: int
    target: object  #: The DMA target; for a listener that is no mapper, the listener.


class MovedError(Exception):
    """A block came under another guard while a thread waited for this one's lock."""


class Home(Protocol):
    """Stands for a block, whose guard can change."""

    guard: Guard


class Guard:
    """The lock, the poison and the claims on discards of one memory, or of one loose block."""

    def __init__(self) -> None:
        self._process = process.current
        self._owner: int | None = None
        self._operation = ""
        # Whoever comes while the lock is taken waits at a gate of its own, and is let in in turn. A
        # bare Lock goes to whichever thread runs next, which is often the one that has just given
        # it back: of eight threads that shared a guest, one waited a second.
        self._lock = Lock()
        self._gates: deque[Lock] = deque()
        self._reason: str | None = None
        #: Sections that a target may still reach, each with the target; oldest first.
        self.doubts: list[tuple[RamSection, object]] = []
        self.discards = DiscardCoordinator()
        self.observer: Observer | None = None
        #: Whether a VM has page attributes, which go with the page states.
        self.has_vm = False

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
        :param even_poisoned: For an operation that only takes away.
        :param home: Has to be under this guard still when the lock is held.
        :raises BusyError: This thread holds the lock: a listener, source or target called back in.
        :raises UsageError: This process is a fork of the one that made the memory.
        :raises PoisonedError: Unless *even_poisoned*.
        :raises MovedError: *home* is under another guard by now. In each case nothing was called.
        """
        if self._process != process.current:
            process.refuse_fork(operation)
        if self._owner == get_ident():
            inside = f"{self._operation}, which holds the memory's lock"
            raise BusyError(f"{operation} was called from inside {inside}")
        result: T = uninterrupted(self._run_locked, operation, work, arguments, even_poisoned, home)
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

    @property
    def poisoned(self) -> bool:
        """Whether something was left in a state that is not known. Never goes back to False."""
        return self._reason is not None

    def poison(self, reason: str) -> None:
        """Poison; only the first reason is kept."""
        first = self._reason is None
        if first:
            self._reason = reason
        # The others can be many; in_doubt() has them.
        _log.log(logging.CRITICAL if first else logging.DEBUG, "poisoned: %s", reason)

    def poisoned_error(self, operation: str) -> PoisonedError:
        """Build the error that every changing call raises from now on."""
        text = f"{operation}: the memory is poisoned: {self._reason}"
        return PoisonedError(text, step="poisoned")

    def doubt(self, section: RamSection, listener: object, reason: str) -> None:
        """Poison: *listener*, or the target it drives, may or may not still reach *section*."""
        self.doubts.append((section, getattr(listener, "target", listener)))
        where = describe_range(section.gpa, section.size)
        self.poison(f"{where} of block {section.block.name!r}: {reason}")

    def doubts_of(self, block: Block) -> list[object]:
        """List the targets that may still reach a page of *block*."""
        return [target for section, target in self.doubts if section.block is block]

    def in_doubt(self) -> list[InDoubt]:
        """List the doubts by target, ascending, without overlaps."""
        by_target: dict[int, tuple[object, list[tuple[int, int]]]] = {}
        for section, target in list(self.doubts):  # another thread may add some
            _, ranges = by_target.setdefault(id(target), (target, []))
            ranges.append((section.gpa, section.gpa_end))
        return [
            InDoubt(start, end - start, target)
            for target, ranges in by_target.values()
            for start, end in merge(sorted(ranges))
        ]

    def leave_with(self, other: Guard, block: Block, holds: list[DiscardHold]) -> None:
        """Give a block that goes to *other* its own: *holds*, doubts, and the poison."""
        other.discards.adopt(self.discards, holds)
        other.doubts = [doubt for doubt in self.doubts if doubt[0].block is block]
        other._reason = self._reason
