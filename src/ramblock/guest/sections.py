# SPDX-License-Identifier: Apache-2.0
"""The sections of a guest, by guest physical address."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from ramblock.errors import UsageError, describe_range
from ramblock.memory.section import RamSection

__all__ = ["SectionMap"]


def _gpa(section: RamSection) -> int:
    return section.gpa


class SectionMap:
    """
    Disjoint sections, ascending. Small: a guest has a few, whatever its size.

    Each change makes a new tuple, so that readers need no lock.
    """

    def __init__(self) -> None:
        self._sections: tuple[RamSection, ...] = ()
        # Guest addresses where the attributes of an earlier section could not be reset.
        self._private: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[RamSection]:
        return iter(self._sections)

    def __contains__(self, section: object) -> bool:
        return section in self._sections

    def of_block(self, block: object) -> list[RamSection]:
        """List the sections of *block*, ascending."""
        return [section for section in self._sections if section.block is block]

    def check_free(self, section: RamSection) -> None:
        """
        Check that *section* could be added.

        :raises UsageError: Its guest addresses are taken, or, with private backing, its part of the block is.
        """
        for other in self._sections:
            if other.gpa < section.gpa_end and section.gpa < other.gpa_end:
                raise UsageError(
                    f"{section!r} overlaps {other!r} in guest addresses", value=section
                )
            same = other.block is section.block and section.block.private is not None
            if same and other.offset < section.end and section.offset < other.end:
                raise UsageError(
                    f"{section!r} overlaps {other!r} in the block: a page with a private side has one address",
                    value=section,
                )

    def add(self, section: RamSection) -> None:
        """Add a section that :meth:`check_free` has passed."""
        self._sections = tuple(sorted((*self._sections, section), key=_gpa))

    def discard(self, section: RamSection) -> None:
        """Take a section out, if it is there."""
        self._sections = tuple(other for other in self._sections if other != section)

    def note_private(self, section: RamSection) -> None:
        """Note that the attributes of *section*, which is not there any more, may still be private."""
        self._private.append((section.gpa, section.gpa_end))

    def may_be_private(self, section: RamSection) -> bool:
        """Whether the attributes of a section that is to be placed may be private from an earlier one."""
        return any(start < section.gpa_end and section.gpa < end for start, end in self._private)

    def find(self, gpa: int) -> RamSection | None:
        """Find the section at *gpa*, if any."""
        sections = self._sections
        index = bisect_right(sections, gpa, key=_gpa) - 1
        if index >= 0 and gpa < sections[index].gpa_end:
            return sections[index]
        return None

    def pieces(self, gpa: int, size: int) -> list[RamSection]:
        """
        Cut ``[gpa, gpa + size)`` at section boundaries.

        :return: Parts of sections, ascending, that together are the range.
        :raises UsageError: A byte of it belongs to no section; the text names the first.
        """
        pieces = []
        position, end = gpa, gpa + size
        while position < end:
            section = self.find(position)
            if section is None:
                raise UsageError(
                    f"{describe_range(gpa, size)}: nothing is mapped at {position:#x}",
                    value=position,
                    expected="RAM",
                )
            stop = min(end, section.gpa_end)
            offset = section.offset + position - section.gpa
            if position == section.gpa and stop == section.gpa_end:
                pieces.append(section)
            else:
                pieces.append(section.part(offset, offset + stop - position))
            position = stop
        return pieces
