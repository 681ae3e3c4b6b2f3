# SPDX-License-Identifier: Apache-2.0
"""The plug points of a discard manager: what a source has to answer, and what a listener is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ramblock.memory.section import RamSection

__all__ = ["Budget", "BudgetedListener", "Listener", "Source"]


class Source(Protocol):
    """
    Something that knows which parts of a block are populated (QEMU: RamDiscardSource).

    A source may also have ``ranges(offset, size) -> Iterator[(offset, size)]``, the populated runs inside the range,
    ascending; without it, ``is_populated`` is asked granule by granule. And it may have ``on_adding()``, called under the
    lock before it is added, where raising refuses, and ``on_removed()``, called once it was removed, or when adding it failed.
    """

    @property
    def granularity(self) -> int:
        """Smallest piece whose state can change, in bytes; a power of two."""

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether all of ``[offset, offset + size)`` is populated; any alignment."""


class Listener(Protocol):
    """
    Told about the populated parts of a section (QEMU: RamDiscardListener).

    With an attribute ``sparse_discard = True`` one discard may also cover pages that it does not hold.
    """

    def notify_populate(self, section: RamSection) -> None:
        """*section* is about to be used. Raise to refuse; then nothing of it is held."""

    def notify_discard(self, section: RamSection) -> None:
        """*section* is going away. Raising means that it may still be in use."""


class Budget(Protocol):
    """A limit on entries that several listeners share; one per mapper."""

    @property
    def limit(self) -> int | None:
        """Entries that may exist at once; None: any number."""

    def require(self, extra: int) -> None:
        """Raise ``MappingLimitError`` unless *extra* entries more may exist at once."""


class BudgetedListener(Listener, Protocol):
    """A listener whose entries are counted before anything is done."""

    budget: Budget
    granularity: int
    unsettled: bool
    """An undo of its own was interrupted: what it holds is not known."""

    def let_go(self) -> None:
        """Let go of all it holds, as far as it can; report the rest as in doubt."""

    def entries_to_populate(self, sections: Iterable[RamSection]) -> int:
        """How many entries more *sections* need."""

    def entries_to_discard(self, section: RamSection) -> int:
        """How many entries more must be possible at once to discard *section* and to put it back."""
