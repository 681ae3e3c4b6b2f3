# SPDX-License-Identifier: Apache-2.0
"""The plug point for listeners, and the registrations of one block, found by place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple, Protocol, cast

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

    mapper: Budget  #: Whose entries they are.
    granularity: int  #: Smallest piece that it can let go of, in bytes.

    def let_go(self) -> None:
        """Let go of all it holds, as far as it can; report the rest as in doubt."""

    def entries_to_populate(self, sections: Iterable[RamSection]) -> int:
        """How many more entries *sections* need."""

    def entries_to_discard(self, section: RamSection) -> int:
        """How many more entries must be possible at once to discard *section* and put it back."""


class Registration(NamedTuple):
    """A listener, its section, and its abilities beyond the two verbs."""

    number: int  #: Grows with each registration.
    listener: Listener
    section: RamSection
    sparse: bool
    budgeted: BudgetedListener | None

    @property
    def target(self) -> object:
        """For errors: the DMA target that the listener drives, or else itself."""
        return getattr(self.listener, "target", self.listener)

    @property
    def limited(self) -> bool:
        """Whether it has a budget that can run out."""
        return self.budgeted is not None and self.budgeted.mapper.limit is not None


_number = attrgetter("number")


class Registry:
    """
    The registrations of one block; the caller locks.

    The cost of telling is in the sections that meet a change, however many the block has. They are
    kept on shelves by size: one that meets [start, end) and is shorter than 2**n begins behind
    ``start - 2**n``, so that each shelf is searched by halves.
    """

    def __init__(self) -> None:
        self._by_listener: dict[int, Registration] = {}
        # By the bits of the section's size: the offsets, ascending, and who is registered there.
        self._shelves: dict[int, tuple[list[int], list[Registration]]] = {}
        self._last = 0
        #: The number of those with a budget that can run out.
        self.limited = 0

    def __iter__(self) -> Iterator[Registration]:
        return iter(sorted(self._by_listener.values(), key=_number))

    def make(self, listener: Listener, section: RamSection) -> Registration:
        """Find out the abilities of *listener*; this does not register it."""
        self._last += 1
        sparse = bool(getattr(listener, "sparse_discard", False))
        counts = hasattr(listener, "entries_to_discard")
        budgeted = cast("BudgetedListener", listener) if counts else None
        return Registration(self._last, listener, section, sparse, budgeted)

    def find(self, listener: Listener) -> Registration | None:
        """Look up the registration of *listener*."""
        return self._by_listener.get(id(listener))

    def add(self, registration: Registration) -> None:
        """Register, in the place of an earlier registration of the same listener."""
        self.discard(registration.listener)
        self._by_listener[id(registration.listener)] = registration
        self.limited += registration.limited
        section = registration.section
        offsets, registrations = self._shelves.setdefault(section.size.bit_length(), ([], []))
        index = bisect_right(offsets, section.offset)
        offsets.insert(index, section.offset)
        registrations.insert(index, registration)

    def discard(self, listener: Listener) -> None:
        """Strike *listener*; nothing happens if it is not registered."""
        registration = self._by_listener.pop(id(listener), None)
        if registration is not None:
            self.limited -= registration.limited
            section = registration.section
            offsets, registrations = self._shelves[section.size.bit_length()]
            # Several may begin there. Equal means identical, since the first field is a number.
            index = registrations.index(registration, bisect_left(offsets, section.offset))
            del offsets[index], registrations[index]
            if not offsets:
                del self._shelves[section.size.bit_length()]

    def overlapping(self, start: int, end: int) -> list[Registration]:
        """List the registrations whose section meets [start, end), in the order they were made."""
        found = []
        for shift, (offsets, registrations) in self._shelves.items():
            first = bisect_right(offsets, start - (1 << shift))
            for index in range(first, bisect_left(offsets, end, first)):
                registration = registrations[index]
                if offsets[index] + registration.section.size > start:
                    found.append(registration)
        if len(found) > 1:
            found.sort(key=_number)
        return found
