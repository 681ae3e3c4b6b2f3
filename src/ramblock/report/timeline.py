# SPDX-License-Identifier: Apache-2.0
"""
The pictures of a trace: rectangles of time and memory, and counts over time.

Its memory is bounded for a trace of any length. When there are too many rectangles the shortest go,
those that show a stale mapping last of all; when there are too many counts every second one goes,
and of two the one with more stale bytes stays. The page tells of rectangles that were left out.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from ramblock.report.picture import Picture, Rectangle, Shade
from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import Finding

__all__ = ["MOST_RECTANGLES", "Counts", "Timeline"]

#: Rectangles that a page can draw without delay.
MOST_RECTANGLES = 200_000
_MOST_COUNTS = 20_000
_MOST_BUCKETS = 1_000


class Counts(NamedTuple):
    """Bytes, from this time on."""

    time: int
    shared: int
    mapped: int
    """Reached by at least one device."""
    stale: int


class Rate:
    """Counts events in buckets of time, which get wider as the trace gets longer."""

    def __init__(self) -> None:
        self.width = 1_000_000
        self.buckets: dict[int, int] = {}

    def add(self, time: int) -> None:
        """Count one."""
        bucket = time // self.width
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        if len(self.buckets) > _MOST_BUCKETS:
            self.widen(self.width * 2)

    def widen(self, width: int) -> None:
        """Make buckets wider; to a multiple of their width."""
        old, factor = self.buckets, width // self.width
        self.width, self.buckets = width, {}
        for bucket, count in old.items():
            self.buckets[bucket // factor] = self.buckets.get(bucket // factor, 0) + count


class Timeline:
    """
    Keeps the data of an audit's picture; an :class:`~ramblock.trace.observer.AuditObserver`.

    :param most: Rectangles to keep.
    """

    def __init__(self, most: int = MOST_RECTANGLES) -> None:
        self._most = most
        self._picture = Picture()
        self._counts: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
        self._began: int | None = None
        #: Rectangles that were left out, and the longest of them in nanoseconds.
        self.left_out = 0
        self.left_out_below = 0
        #: Conversions that ended, where the trace tells; else changes of page states; and accesses
        #: that an IOMMU refused.
        self.conversions = Rate()
        self.changes = Rate()
        self.faults = Rate()

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        """Note that pages are now private or shared."""
        if time != self._picture.now:
            self._advance(time)
        if not self.conversions.buckets:
            self.changes.add(time)
        self._picture.page_state(start, end, private=private)

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target mapped a range."""
        if time != self._picture.now:
            self._advance(time)
        self._picture.mapped(target, start, end)

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target unmapped a range; parts of it may not have been mapped."""
        if time != self._picture.now:
            self._advance(time)
        self._picture.unmapped(target, start, end)

    def converted(self, event: ConversionEnd) -> None:
        """Note the end of a conversion."""
        self.changes.buckets.clear()
        self.conversions.add(self.ended if event.time is None else event.time)

    def accessed(self, event: Access) -> None:
        """Note a fault."""
        if event.refused:
            self.faults.add(self.ended if event.time is None else event.time)

    def found(self, finding: Finding) -> None:
        """Take a finding: the page shows those that the audit kept, so this keeps none."""

    @property
    def began(self) -> int:
        """The first time that something changed."""
        return self._began or 0

    @property
    def ended(self) -> int:
        """The last time that something changed."""
        return self._picture.now

    def columns(self) -> list[list[int]]:
        """
        Return the rectangles, each of their fields as a list.

        Those that are still so at the end of the trace end there.
        """
        return self._picture.columns()

    def rectangles(self) -> list[Rectangle]:
        """Return the rectangles."""
        return list(map(Rectangle, *self.columns()))

    def counts(self) -> list[Counts]:
        """Return bytes over time, by time."""
        return [Counts(*each) for each in (*self._counts, self._count_now())]

    def _advance(self, time: int) -> None:
        picture = self._picture
        if self._began is None:
            self._began = time
        if time > picture.now:
            if self._counts[-1][0] != picture.now:
                self._counts.append(self._count_now())
                if len(self._counts) > 2 * _MOST_COUNTS:
                    self._thin_counts()
            picture.now = time
        if len(picture.drawn) > 2 * self._most * len(Rectangle._fields):
            self._thin_rectangles()

    def _thin_rectangles(self) -> None:
        drawn = self._picture.drawn
        fields = len(Rectangle._fields)
        found = [Rectangle(*drawn[at : at + fields]) for at in range(0, len(drawn), fields)]
        found.sort(key=lambda each: (each.shade == Shade.STALE, each.lasted), reverse=True)
        gone = found[self._most :]
        drawn[:] = chain.from_iterable(found[: self._most])
        self.left_out += len(gone)
        self.left_out_below = max(self.left_out_below, max(each.lasted for each in gone))

    def _count_now(self) -> tuple[int, int, int, int]:
        _, _, mapped, shared, both, stale = self._picture.bytes
        return self._picture.now, shared + both, mapped + both + stale, stale

    def _thin_counts(self) -> None:
        pairs = zip(self._counts[::2], self._counts[1::2], strict=False)
        self._counts = [first if first[3] >= second[3] else second for first, second in pairs]
