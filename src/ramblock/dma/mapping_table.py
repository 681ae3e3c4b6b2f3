# SPDX-License-Identifier: Apache-2.0
"""
The software IOMMU's table: disjoint mappings, ascending by IOVA.

Two plain lists instead of a sorted dictionary, because a change must be one thing for Ctrl-C: CPython delivers signals
between bytecodes at calls and jumps, and the two slice assignments in :meth:`MappingTable.replace` have none in between.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

from ramblock.dma.target import HostRange

__all__ = ["Mapping", "MappingTable"]


class Mapping(NamedTuple):
    """One entry of the IOMMU's table."""

    iova: int
    size: int
    memory: HostRange
    writable: bool

    @property
    def end(self) -> int:
        """First IOVA behind it."""
        return self.iova + self.size

    def part(self, start: int, end: int) -> Mapping:
        """Cut out the piece ``[start, end)``."""
        return Mapping(start, end - start, self.memory_of(start, end), self.writable)

    def memory_of(self, start: int, end: int) -> HostRange:
        """Tell where on this host the piece ``[start, end)`` is."""
        skip = start - self.iova
        fd, offset, address, _ = self.memory
        return HostRange(fd, offset + skip, address + skip, end - start)


class MappingTable:
    """Mappings by IOVA. The caller locks."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        #: Ascending, disjoint.
        self.mappings: list[Mapping] = []

    def __len__(self) -> int:
        return len(self.mappings)

    def overlapping(self, start: int, end: int) -> tuple[int, int]:
        """Find the mappings that touch [start, end), as a half-open range of positions; empty where to insert one."""
        first = bisect_right(self._starts, start)
        if first and self.mappings[first - 1].end > start:
            first -= 1
        return first, bisect_left(self._starts, end, first)

    def replace(self, first: int, last: int, mappings: list[Mapping]) -> None:
        """Put *mappings* in the place of those at positions [first, last)."""
        starts = [mapping.iova for mapping in mappings]
        self._starts[first:last] = starts
        self.mappings[first:last] = mappings

    def clear(self) -> None:
        """Forget all of them."""
        self.replace(0, len(self.mappings), [])


def join_adjacent(ranges: list[HostRange]) -> list[HostRange]:
    """Join host ranges that continue each other: under one mapping per page, an access of 64 KiB is one copy."""
    joined = ranges[:1]
    for part in ranges[1:]:
        fd, offset, address, size = joined[-1]
        if part.fd == fd and part.offset == offset + size and part.address == address + size:
            joined[-1] = HostRange(fd, offset, address, size + part.size)
        else:
            joined.append(part)
    return joined
