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
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import NamedTuple

from ramblock.errors import BusyError, PoisonedError, describe_range
from ramblock.events import Observer, StateChanged
from ramblock.memory.coordination import DiscardCoordinator, DiscardHold
from ramblock.memory.section import RamSection

__all__ = ["Guard", "InDoubt"]

_log = logging.getLogger(__name__)


class InDoubt(NamedTuple):
    """A range that a target may or may not still reach."""

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
        self.discards = DiscardCoordinator()
        self.transaction_open = False
        self.observer: Observer | None = None

    def enter(self, operation: str, *, even_poisoned: bool = False) -> None:
        """
        Take the lock for *operation*; pair it with :meth:`leave` in a ``finally``.

        :raises BusyError: This thread holds it already: a listener, source or target called back in.
        :raises PoisonedError: Unless *even_poisoned*. The lock is free again.
        """
        me = get_ident()
        if self._owner == me:
            raise BusyError(
                f"{operation} was called from inside {self._operation}, which holds the memory's lock"
            )
        try:
            self._lock.acquire()
            self._owner = me
            self._operation = operation
            if not even_poisoned and (self.transaction_open or self._reason is not None):
                raise self.poisoned_error(operation)
        except BaseException:
            self._release(me)
            raise

    def leave(self) -> None:
        """Give the lock back."""
        self._owner = None
        self._lock.release()

    def _release(self, me: int) -> None:
        # An interrupt can hit between acquire() and the note of the owner; nobody else can hold it then.
        if self._owner == me or (self._owner is None and self._lock.locked()):
            self.leave()

    @contextmanager
    def entered(self, operation: str, *, even_poisoned: bool = False) -> Iterator[None]:
        """:meth:`enter` and :meth:`leave` as a context, for calls that happen seldom."""
        self.enter(operation, even_poisoned=even_poisoned)
        try:
            yield
        finally:
            self.leave()

    @property
    def poisoned(self) -> bool:
        """Whether something was left in a state that is not known. Never goes back to False."""
        return self._reason is not None or (self.transaction_open and self._owner is None)

    def poison(self, reason: str) -> None:
        """Poison; the first reason is the one that is kept."""
        if self._reason is None:
            self._reason = reason
        _log.critical("poisoned: %s", reason)

    def doubt(self, section: RamSection, listener: object, reason: str) -> None:
        """Poison, and note that *listener* (or the target it drives) may or may not still reach *section*."""
        self._doubts.append((section, getattr(listener, "target", listener)))
        self.poison(
            f"{describe_range(section.gpa, section.size)} of block {section.block.name!r}: {reason}"
        )

    def poisoned_error(self, operation: str) -> PoisonedError:
        """Build the error that every changing call raises from now on."""
        reason = self._reason or "an operation was interrupted while it was being undone"
        return PoisonedError(f"{operation}: the memory is poisoned: {reason}", step="poisoned")

    @property
    def doubt_count(self) -> int:
        """How many doubts were ever noted."""
        return len(self._doubts)

    def doubts_of(self, block: object) -> list[object]:
        """List the targets that may still reach a page of *block*."""
        return [target for section, target in self._doubts if section.block is block]

    def in_doubt(self) -> list[InDoubt]:
        """List what may still be reached, by target, ascending, without overlaps."""
        result: list[InDoubt] = []
        by_target: dict[int, list[RamSection]] = {}
        targets = {id(target): target for _, target in self._doubts}
        for section, target in self._doubts:
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

    def adopt(self, other: Guard) -> None:
        """Take over poison, doubts and holds of a block's own guard. Raises before anything is taken."""
        self.discards.adopt(other.discards)
        self._doubts += other._doubts
        if other.poisoned:
            self.poison(other._reason or "an operation was interrupted while it was being undone")

    def take_over(self, other: Guard, block: object, holds: list[DiscardHold]) -> None:
        """Take from *other* what concerns *block*, which leaves it: its doubts, its holds, and the poison."""
        other.discards.give_back(self.discards, holds)
        self._doubts = [doubt for doubt in other._doubts if doubt[0].block is block]
        if other.poisoned:
            self._reason = other._reason

    def observe(self, event: StateChanged) -> None:
        """Hand *event* to the observer, if there is one."""
        if self.observer is not None:
            try:
                self.observer(event)
            except Exception:
                _log.exception("the observer failed on %r", event)
