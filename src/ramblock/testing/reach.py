# SPDX-License-Identifier: Apache-2.0
"""The pages that one target was seen to map, and the host memory that they lead to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from ramblock.dma.target import HostRange
from ramblock.testing.marks import Marks, Stretches

__all__ = ["MAPPED", "PERHAPS", "Extent", "Listing", "Reach"]

MAPPED = 1
#: A call that neither worked nor was refused may or may not have been carried out.
PERHAPS = 2


class Extent(Protocol):
    """One mapping, as a target that lists its mappings describes it."""

    @property
    def iova(self) -> int:
        """First address."""

    @property
    def size(self) -> int:
        """In bytes."""


#: Asks a target for all its mappings.
Listing = Callable[[], Iterable[Extent]]


class _Lead(NamedTuple):
    """What is mapped in [start, end) is host memory *distance* bytes away."""

    start: int
    end: int
    distance: int


class Reach:
    """
    One target's part of the picture.

    :param listing: Asks the target itself, where it can tell.
    """

    def __init__(self, listing: Listing | None = None) -> None:
        self.listing = listing
        self.mapped = Marks()
        # As few as sections, ascending and disjoint: a lead says where pages go that are mapped,
        # and nothing of those that are not, so neighbours with the same distance are one.
        self._leads: list[_Lead] = []

    def note(self, mark: int, iova: int, memory: HostRange) -> None:
        """Mark pages, which lead to *memory* if they are mapped."""
        end = iova + memory.size
        self.mapped.put(mark, iova, end)
        distance = memory.address - iova
        position = bisect_right(self._leads, iova, key=_start) - 1
        if position >= 0:
            lead = self._leads[position]
            if lead.distance == distance and end <= lead.end:
                return
        self._lead(_Lead(iova, end, distance))

    def _lead(self, new: _Lead) -> None:
        before = [
            lead._replace(end=min(lead.end, new.start))
            for lead in self._leads
            if lead.start < new.start
        ]
        behind = [
            lead._replace(start=max(lead.start, new.end))
            for lead in self._leads
            if lead.end > new.end
        ]
        if before and before[-1].distance == new.distance:
            new = new._replace(start=before.pop().start)
        if behind and behind[0].distance == new.distance:
            new = new._replace(end=behind.pop(0).end)
        self._leads = [*before, new, *behind]

    def to_memory(self, address: int, size: int) -> Stretches:
        """Yield the stretches of IOVAs that are mapped to host memory [address, address + size)."""
        for start, end, distance in self._leads:
            low, high = max(address - distance, start), min(address + size - distance, end)
            if low < high:
                yield from self.mapped.where(MAPPED, low, high)

    def clear(self) -> None:
        """Note that nothing is mapped any more."""
        self.mapped.clear()
        self._leads.clear()


def _start(lead: _Lead) -> int:
    return lead.start
