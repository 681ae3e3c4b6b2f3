# SPDX-License-Identifier: Apache-2.0
"""
What one guest memory and its blocks have in common: the lock, the poison, who needs discards.

A block has a guard of its own until it is placed; then it takes the memory's, so that one lock covers convert, state
changes, plug, sources, attach and map. Targets have locks of their own, always taken after this one, and no target,
device or socket thread ever takes this one: that is why there is no deadlock to think about.

Poison fails closed. A transaction marks itself open before its first step; if it dies without saying how it ended (a
second Ctrl-C during the undo), the mark is still there for the next caller to find, and counts as poison.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from threading import Lock, get_ident
from typing import NamedTuple, Protocol, TypeVar

from ramblock.errors import BusyError, PoisonedError, describe_range
from ramblock.events import Observer, StateChanged
from ramblock.memory.coordination import DiscardCoordinator, DiscardHold
from ramblock.memory.section import RamSection

__all__ = ["MOVED", "Guard", "HasGuard", "InDoubt", "Moved"]

_log = logging.getLogger(__name__)

_ABANDONED = "an operation was interrupted while it was being undone"


T = TypeVar("T")


class Moved(Enum):
    """Told instead of a result when a block has come under another guard meanwhile."""

    MOVED = "moved"


MOVED = Moved.MOVED


class HasGuard(Protocol):
    """A block, as far as a guard has to know."""

    guard: Guard


class InDoubt(NamedTuple):
    """A range where a target may reach what is not populated, or not reach what is."""

    gpa: int
    """Guest physical address, in bytes."""
    size: int
    """In bytes."""
    target: object
    """The DMA target; for a listener that is no mapper, the listener."""


class Guard:
    """The lock, the poison and the coordination of discards of one guest memory, or of one block that is in none."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None
        self._operation = ""
        self._reason: str | None = None
        self._doubts: list[tuple[RamSection, object]] = []
        #: How many doubts were ever noted.
        self.doubt_count = 0
        self.discards = DiscardCoordinator()
        self.transaction_open = False
        self.observer: Observer | None = None

    def run(
        self,
        operation: str,
        work: Callable[..., T],
        *arguments: object,
        even_poisoned: bool = False,
        home: HasGuard | None = None,
    ) -> T | Moved:
        """
        Call ``work(*arguments)`` with the lock held.

        The lock is taken and given back by a ``with`` on the lock itself, and its owner is noted by bare assignments:
        nowhere in between can Ctrl-C strike, so it can neither leave the lock taken nor give back somebody else's.

        :param operation: For messages.
        :param even_poisoned: For what only takes away.
        :param home: What has to be under this guard still when the lock is held.
        :return: What *work* returns; ``MOVED``, and nothing was called, if *home* is under another guard by now.
        :raises BusyError: This thread holds the lock already: a listener, source or target called back in.
        :raises PoisonedError: Unless *even_poisoned*; nothing was called.
        """
        me = get_ident()
        if self._owner == me:
            raise BusyError(
                f"{operation} was called from inside {self._operation}, which holds the memory's lock"
            )
        with self._lock:
            self._owner = me
            try:
                if home is not None and home.guard is not self:
                    return MOVED
                self._operation = operation
                self._check_poison(operation, even_poisoned=even_poisoned)
                return work(*arguments)
            finally:
                self._owner = None

    def _check_poison(self, operation: str, *, even_poisoned: bool) -> None:
        if self.transaction_open:
            # Nobody was inside, so whoever opened it died. Noted before a detach or close opens and ends its own.
            self.poison(_ABANDONED)
            self.transaction_open = False
        if not even_poisoned and self._reason is not None:
            raise self.poisoned_error(operation)

    @property
    def poisoned(self) -> bool:
        """Whether something was left in a state that is not known. Never goes back to False."""
        return self._reason is not None or (self.transaction_open and self._owner is None)

    def poison(self, reason: str) -> None:
        """Poison; the first reason is the one that is kept."""
        first = self._reason is None
        if first:
            self._reason = reason
        # What comes after the first can be many; in_doubt() has it.
        _log.log(logging.CRITICAL if first else logging.DEBUG, "poisoned: %s", reason)

    def run_to_the_end(self, operation: str, work: Callable[[], None]) -> None:
        """
        Call *work*, which puts nothing back, for a caller that holds the lock. If it does not come to its end, poison.

        :raises BaseException: What *work* raised.
        """
        try:
            work()
        except BaseException as error:
            self.poison(f"{operation} did not come to its end: {error!r}")
            raise

    def doubt(self, section: RamSection, listener: object, reason: str) -> None:
        """Poison, and note that *listener* (or the target it drives) may or may not still reach *section*."""
        self._doubts.append((section, getattr(listener, "target", listener)))
        self.doubt_count += 1
        self.poison(
            f"{describe_range(section.gpa, section.size)} of block {section.block.name!r}: {reason}"
        )

    def poisoned_error(self, operation: str) -> PoisonedError:
        """Build the error that every changing call raises from now on."""
        reason = self._reason or _ABANDONED
        return PoisonedError(f"{operation}: the memory is poisoned: {reason}", step="poisoned")

    def doubted_since(self, count: int, block: object, start: int, end: int) -> bool:
        """Whether a page of ``[start, end)`` of *block* came into doubt when *count* doubts were noted already."""
        return any(
            section.block is block and section.offset < end and start < section.end
            for section, _ in self._doubts[count:]
        )

    def doubts_of(self, block: object) -> list[object]:
        """List the targets that may still reach a page of *block*."""
        return [target for section, target in self._doubts if section.block is block]

    def in_doubt(self) -> list[InDoubt]:
        """List what may still be reached, by target, ascending, without overlaps."""
        result: list[InDoubt] = []
        by_target: dict[int, list[RamSection]] = {}
        doubts = list(self._doubts)  # another thread may add some
        targets = {id(target): target for _, target in doubts}
        for section, target in doubts:
            by_target.setdefault(id(target), []).append(section)
        for key, sections in by_target.items():
            start = end = -1
            for section in sorted(sections, key=lambda section: section.gpa):
                if section.gpa > end:
                    if end > start:
                        result.append(InDoubt(start, end - start, targets[key]))
                    start, end = section.gpa, section.gpa + section.size
                else:
                    end = max(end, section.gpa + section.size)
            result.append(InDoubt(start, end - start, targets[key]))
        return result

    def adopt(self, other: Guard) -> list[DiscardHold]:
        """
        Take over the holds of a block's own guard, which is not poisoned.

        :return: What was taken over, for :meth:`leave_with`.
        :raises BusyError: A hold contradicts one of ours; nothing is taken.
        """
        return self.discards.adopt(other.discards)

    def leave_with(self, other: Guard, block: object, holds: list[DiscardHold]) -> None:
        """Give a block that goes to *other* what concerns it: its *holds*, its doubts, and the poison."""
        self.discards.give_back(other.discards, holds)
        other._doubts = [doubt for doubt in self._doubts if doubt[0].block is block]
        other.doubt_count = len(other._doubts)
        if self.poisoned:
            other._reason = self._reason or _ABANDONED

    def observe(self, event: StateChanged) -> None:
        """Hand *event* to the observer, if there is one."""
        if self.observer is not None:
            try:
                self.observer(event)
            except Exception:
                # Ctrl-C is not an observer's failure: it goes on to the caller, whose work is done.
                _log.exception("the observer failed on %r", event)
