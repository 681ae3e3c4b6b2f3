# SPDX-License-Identifier: Apache-2.0
"""Who listens where: the registrations of one block, found by place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple, cast

from ramblock.discard.listeners import BudgetedListener, Listener
from ramblock.discard.section import RamSection

__all__ = ["Registration", "Registry"]


class Registration(NamedTuple):
    """A listener, its section, and what it can do beyond the two verbs."""

    number: int
    """Grows with each registration."""
    listener: Listener
    section: RamSection
    sparse: bool
    budgeted: BudgetedListener | None

    @property
    def target(self) -> object:
        """For errors: the DMA target that the listener drives, or else itself."""
        return getattr(self.listener, "target", self.listener)


class _Shelf(NamedTuple):
    """Registrations of sections of like size, ascending by offset."""

    offsets: list[int]
    registrations: list[Registration]

    def find(self, registration: Registration) -> int:
        index = bisect_left(self.offsets, registration.section.offset)
        while self.registrations[index] is not registration:
            index += 1
        return index


class Registry:
    """
    The registrations of one block, found by place: telling costs what overlaps a change, however
    many sections the block has.

    Sections are kept on shelves by size. One that meets [start, end) and is shorter than 2**n begins
    behind ``start - 2**n``, so that each shelf is searched by halves. The caller locks.
    """

    def __init__(self) -> None:
        self._by_listener: dict[int, Registration] = {}
        self._shelves: dict[int, _Shelf] = {}
        self._last = 0
        #: How many of them have a budget that can run out.
        self.limited = 0

    def __iter__(self) -> Iterator[Registration]:
        return iter(sorted(self._by_listener.values(), key=_number))

    def make(self, listener: Listener, section: RamSection) -> Registration:
        """Find out what *listener* can do; this does not register it."""
        self._last += 1
        budgeted = hasattr(listener, "entries_to_discard")
        return Registration(
            self._last,
            listener,
            section,
            bool(getattr(listener, "sparse_discard", False)),
            cast("BudgetedListener", listener) if budgeted else None,
        )

    def find(self, listener: Listener) -> Registration | None:
        """Look up the registration of *listener*."""
        return self._by_listener.get(id(listener))

    def add(self, registration: Registration) -> None:
        """Register, in the place of what the same listener had before."""
        self.discard(registration.listener)
        self._by_listener[id(registration.listener)] = registration
        self.limited += _is_limited(registration)
        key = registration.section.size.bit_length()
        shelf = self._shelves.setdefault(key, _Shelf([], []))
        index = bisect_right(shelf.offsets, registration.section.offset)
        shelf.offsets.insert(index, registration.section.offset)
        shelf.registrations.insert(index, registration)

    def discard(self, listener: Listener) -> None:
        """Strike *listener*; nothing happens if it is not registered."""
        registration = self._by_listener.pop(id(listener), None)
        if registration is not None:
            self.limited -= _is_limited(registration)
            key = registration.section.size.bit_length()
            shelf = self._shelves[key]
            index = shelf.find(registration)
            del shelf.offsets[index], shelf.registrations[index]
            if not shelf.offsets:
                del self._shelves[key]

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


_number = attrgetter("number")


def _is_limited(registration: Registration) -> bool:
    budgeted = registration.budgeted
    return budgeted is not None and budgeted.mapper.limit is not None
