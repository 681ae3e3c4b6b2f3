# SPDX-License-Identifier: Apache-2.0
"""The plug point for listeners."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ramblock.discard.section import RamSection


class Listener(Protocol):
    """
    Told about the populated parts of a section (QEMU: RamDiscardListener).

    Each section that it hears of is a part of the one it registered for, with :attr:`gpa` and
    ``readonly`` of that one. With an attribute ``sparse_discard = True`` one discard may also cover
    pages that it does not hold.
    """

    def notify_populate(self, section: RamSection) -> None:
        """*section* is about to be used. Raise to refuse; then nothing of it is held."""

    def notify_discard(self, section: RamSection) -> None:
        """*section* is going away. Raising means that it may still be in use."""


class Budget(Protocol):
    """A limit on entries that several listeners share; a mapper is one."""

    @property
    def limit(self) -> int | None:
        """Entries that may exist at once; None: any number."""

    def require(self, extra: int) -> None:
        """Raise ``MappingLimitError`` unless *extra* entries more may exist at once."""


class BudgetedListener(Listener, Protocol):
    """A listener whose entries are counted before anything is done."""

    mapper: Budget
    """Whose entries they are."""
    granularity: int
    """Smallest piece that it can let go of, in bytes."""

    def let_go(self) -> None:
        """Let go of all it holds, as far as it can; report the rest as in doubt."""

    def entries_to_populate(self, sections: Iterable[RamSection]) -> int:
        """How many more entries *sections* need."""

    def entries_to_discard(self, section: RamSection) -> int:
        """How many more entries must be possible at once to discard *section* and put it back."""
