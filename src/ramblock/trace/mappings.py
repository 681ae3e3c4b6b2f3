# SPDX-License-Identifier: Apache-2.0
"""The mappings of one target, as far as the trace tells."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ramblock.trace.events import Origin, Source
from ramblock.trace.ranges import RangeMap
from ramblock.trace.result import TargetSummary
from ramblock.trace.windows import WindowMap

__all__ = ["Mapping", "TargetState", "UnmapRule", "Unmapping"]

UnmapRule = str
"""``exact``, ``whole`` or ``cut``: see :class:`~ramblock.trace.events.Layout`."""


class Mapping(msgspec.Struct, eq=False, gc=False):
    """The mapping of one map call."""

    start: int
    end: int
    source: Source
    line: int
    key: int | None
    copies: int = 1
    """In how many IOMMU domains: type1 maps everything once for each domain of its container."""


class Unmapping(NamedTuple):
    """The mappings that an unmap meets."""

    pieces: list[tuple[int, int, Mapping]]
    """The parts of mappings in its range."""
    bisects: bool
    """Whether a mapping reaches out of the range."""
    exact: bool
    """Whether the range is exactly one whole mapping."""

    @property
    def mapped_bytes(self) -> int:
        """Bytes that were mapped in the range."""
        return sum(end - start for start, end, _ in self.pieces)


class TargetState:
    """
    One target: its mappings, and their faults.

    :param complete: Whether the trace has it from the beginning: a mapping that is not in it did
        not exist.
    """

    def __init__(self, name: str, rule: UnmapRule | None, *, complete: bool) -> None:
        self.name = name
        self.rule = rule
        self.complete = complete
        #: Whether the trace says when it goes; others are gone when they map nothing any more.
        self.declared = False
        #: Whether it maps this guest's pages: others are not expected to (the kernel maps for its
        #: own drivers too).
        self.expected = complete
        self.mappings: RangeMap[Mapping] = RangeMap()
        #: Private and mapped.
        self.stale = WindowMap()
        #: Still mapped, though an unmap was to remove it.
        self.refused = WindowMap()
        #: Unplugged and mapped.
        self.unplugged = WindowMap()
        #: Given back to the host and mapped.
        self.freed = WindowMap()
        #: Shared and not mapped.
        self.missing = WindowMap()
        #: Where a map failed. A VMM that goes on all the same unmaps there later, and that is no
        #: mistake of its own.
        self.failed: RangeMap[Origin] = RangeMap()
        self.maps = 0
        self.unmaps = 0
        self.faults = 0
        #: Unmaps whose result the trace does not tell; those of them that named more or less than
        #: one mapping; the mappings that these covered.
        self.untold = 0
        self.untold_inexact = 0
        self.untold_mappings = 0

    @property
    def windows(self) -> tuple[WindowMap, ...]:
        """All that is open."""
        return self.stale, self.refused, self.unplugged, self.freed, self.missing

    def summary(self) -> TargetSummary:
        """Sum up its present mappings."""
        entries = mapped = 0
        before: Mapping | None = None
        for start, end, mapping in self.mappings.items():
            mapped += end - start
            entries += mapping is not before
            before = mapping
        return TargetSummary(self.name, self.maps, self.unmaps, self.faults, mapped, entries)

    def meet(self, start: int, end: int) -> Unmapping:
        """Find the mappings that an unmap of this range meets."""
        pieces = self.mappings.pieces(start, end)
        if not pieces:
            return Unmapping(pieces, bisects=False, exact=False)
        first, last = pieces[0], pieces[-1]
        bisects = first[2].start < first[0] or last[2].end > last[1]
        exact = len(pieces) == 1 and not bisects and first[0] == start and first[1] == end
        return Unmapping(pieces, bisects, exact)

    def remove(
        self, start: int, end: int, pieces: list[tuple[int, int, Mapping]]
    ) -> list[tuple[int, int]]:
        """
        Unmap the pieces, which are all that is mapped in the range.

        Return the ranges that no domain maps any more.
        """
        mappings = self.mappings
        if all(mapping.copies == 1 for _, _, mapping in pieces):
            mappings.set(start, end, None)
            return [(piece_start, piece_end) for piece_start, piece_end, _ in pieces]
        gone = []
        for piece_start, piece_end, mapping in pieces:
            if mapping.copies == 1:
                mappings.set(piece_start, piece_end, None)
                gone.append((piece_start, piece_end))
            else:
                rest = msgspec.structs.replace(mapping, copies=mapping.copies - 1)
                mappings.set(piece_start, piece_end, rest)
        return gone
