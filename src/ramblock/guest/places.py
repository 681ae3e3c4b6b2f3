# SPDX-License-Identifier: Apache-2.0
"""The sections of a guest, found by guest physical address and by block."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from ramblock.discard.section import RamSection
from ramblock.dma.mapper import SectionMapper
from ramblock.errors import UsageError, describe_range
from ramblock.guest.block import RamBlock
from ramblock.ranges import Runs
from ramblock.units import PAGE_SIZE


@dataclass(slots=True, eq=False)
class Place:
    """A section of the guest, its block, and the listeners that mappers have for it."""

    block: RamBlock
    section: RamSection
    #: By the mapper's attachment.
    listeners: dict[object, SectionMapper] = field(default_factory=dict)

    def runs(self, *, shared: bool) -> Runs:
        """Yield the runs of the block that appear here and are shared, or private; ascending."""
        section, attributes = self.section, self.block.attributes
        if attributes is not None:
            first, last = section.offset // PAGE_SIZE, section.end // PAGE_SIZE
            for start, end in attributes.bits.runs(first, last, value=shared):
                yield start * PAGE_SIZE, end * PAGE_SIZE
        elif shared:
            yield section.offset, section.end


_offset = attrgetter("section.offset")


class PlaceMap:
    """
    Disjoint places, ascending by guest address.

    Each change makes new lists, so that readers need no lock; a change of one list while another
    thread searches it would show the wrong place.
    """

    def __init__(self) -> None:
        self._index: tuple[list[int], list[Place]] = ([], [])
        # By the block's id: its places, ascending by offset.
        self._of_block: dict[int, list[Place]] = {}

    def __iter__(self) -> Iterator[Place]:
        return iter(self._index[1])

    def of_block(self, block: RamBlock) -> list[Place]:
        """List the places of *block*, ascending by offset."""
        return list(self._of_block.get(id(block), ()))

    def look_up(self, section: object) -> Place | None:
        """Find the place whose section equals *section*."""
        if not isinstance(section, RamSection):
            return None
        starts, places = self._index
        index = bisect_right(starts, section.gpa) - 1
        return places[index] if index >= 0 and places[index].section == section else None

    def check_free(self, block: RamBlock, section: RamSection) -> None:
        """Raise UsageError if its addresses, or its part of a confidential block, are taken."""
        starts, places = self._index
        after = bisect_left(starts, section.gpa_end)
        if after and section.gpa < places[after - 1].section.gpa_end:
            other = places[after - 1].section
            raise UsageError(f"{section!r} overlaps {other!r} in guest addresses", value=section)
        if block.private is None:
            return
        # Those of such a block are disjoint: only the last that begins before our end can overlap.
        in_block = self._of_block.get(id(block), [])
        after = bisect_left(in_block, section.end, key=_offset)
        if after and section.offset < in_block[after - 1].section.end:
            overlap = f"{section!r} overlaps {in_block[after - 1].section!r} in the block"
            text = f"{overlap}: a page with a private side has one address"
            raise UsageError(text, value=section)

    def add(self, place: Place) -> None:
        """Add a place that :meth:`check_free` has passed."""
        starts, places = list(self._index[0]), list(self._index[1])
        position = bisect_left(starts, place.section.gpa)
        starts.insert(position, place.section.gpa)
        places.insert(position, place)
        self._index = starts, places
        insort(self._of_block.setdefault(id(place.block), []), place, key=_offset)

    def discard(self, place: Place) -> None:
        """Take a place out, if it is there."""
        starts, places = list(self._index[0]), list(self._index[1])
        position = bisect_left(starts, place.section.gpa)
        if position < len(places) and places[position] is place:
            del starts[position], places[position]
            self._index = starts, places
            of_block = self._of_block[id(place.block)]
            of_block.remove(place)
            if not of_block:
                del self._of_block[id(place.block)]

    def pieces(self, gpa: int, size: int) -> list[tuple[Place, int, int]]:
        """
        Cut a range at section borders: ascending places, each with its bytes (start, end).

        :raises UsageError: A byte of it belongs to no section; the text names the first.
        """
        starts, places = self._index
        index = bisect_right(starts, gpa) - 1
        if index >= 0:
            # Nearly always it lies in one section.
            section = places[index].section
            start = gpa - section.gpa
            if start + size <= section.size:
                start += section.offset
                return [(places[index], start, start + size)]
        pieces: list[tuple[Place, int, int]] = []
        position, end = gpa, gpa + size
        while position < end:
            place = places[index] if 0 <= index < len(places) else None
            if place is None or not place.section.gpa <= position < place.section.gpa_end:
                text = f"{describe_range(gpa, size)}: nothing is mapped at {position:#x}"
                raise UsageError(text, value=position, expected="RAM", reason="hole")
            section = place.section
            stop = min(end, section.gpa_end)
            shift = section.offset - section.gpa
            pieces.append((place, position + shift, stop + shift))
            position = stop
            index += 1
        return pieces
