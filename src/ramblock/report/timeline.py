# SPDX-License-Identifier: Apache-2.0
"""
The pictures of a trace: rectangles of time and memory, and counts over time.

Its memory is bounded for a trace of any length. When there are too many rectangles the shortest go,
those that show a stale mapping last of all; when there are too many counts every second one goes,
and of two the one with more stale bytes stays. The page tells of rectangles that were left out.
"""

from __future__ import annotations

from typing import NamedTuple

from ramblock.report.shades import Cell, GuestPicture, Shade
from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import Finding

__all__ = ["MOST_RECTANGLES", "Counts", "Rectangle", "Timeline"]

#: Rectangles that a page can draw without delay.
MOST_RECTANGLES = 200_000
_MOST_COUNTS = 20_000
_MOST_BUCKETS = 1_000


class Rectangle(NamedTuple):
    """
    A run of pages that looked the same for a while.

    Nanoseconds of the trace's clock, guest addresses in bytes; ends exclusive.
    """

    since: int
    until: int
    start: int
    end: int
    shade: Shade


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
        self._picture = GuestPicture(self._changed)
        self._rectangles: list[Rectangle] = []
        self._counts: list[Counts] = [Counts(0, 0, 0, 0)]
        self._thinning = 0
        self._bytes = [0] * len(Shade)
        self._now = 0
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
        self._at(time)
        if not self.conversions.buckets:
            self.changes.add(time)
        self._picture.page_state(time, start, end, private=private)

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target mapped a range."""
        self._at(time)
        self._picture.mapped(time, target, start, end)

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target unmapped a range."""
        self._at(time)
        self._picture.unmapped(time, target, start, end)

    def converted(self, event: ConversionEnd) -> None:
        """Note the end of a conversion."""
        self.changes.buckets.clear()
        self.conversions.add(self._now if event.time is None else event.time)

    def accessed(self, event: Access) -> None:
        """Note a fault."""
        if event.refused:
            self.faults.add(self._now if event.time is None else event.time)

    def found(self, finding: Finding) -> None:
        """Take a finding: the page shows those that the audit kept, so this keeps none."""

    @property
    def began(self) -> int:
        """The first time that something changed."""
        return self._began or 0

    @property
    def ended(self) -> int:
        """The last time that something changed."""
        return self._now

    def rectangles(self) -> list[Rectangle]:
        """Return the rectangles; those that are still so at the end of the trace end there."""
        still = [
            Rectangle(cell.since, self._now, start, end, cell.shade)
            for start, end, cell in self._picture.cells()
        ]
        return self._rectangles + still

    def counts(self) -> list[Counts]:
        """Return bytes over time, by time."""
        return [*self._counts, self._count_now()]

    def _at(self, time: int) -> None:
        if self._began is None:
            self._began = time
        if time > self._now:
            if self._counts[-1].time != self._now:
                self._add_count()
            self._now = time

    def _changed(self, start: int, end: int, old: Cell, new: Cell) -> None:
        size = end - start
        before, after = old.shade, new.shade
        self._bytes[before] -= size
        self._bytes[after] += size
        if before is Shade.NOTHING or (old.since == self._now and before is not Shade.STALE):
            return
        self._rectangles.append(Rectangle(old.since, self._now, start, end, before))
        if len(self._rectangles) > 2 * self._most:
            self._thin_rectangles()

    def _thin_rectangles(self) -> None:
        def importance(each: Rectangle) -> tuple[bool, int]:
            return each.shade is Shade.STALE, each.until - each.since

        self._rectangles.sort(key=importance, reverse=True)
        gone = self._rectangles[self._most :]
        del self._rectangles[self._most :]
        self.left_out += len(gone)
        self.left_out_below = max(
            self.left_out_below, max(each.until - each.since for each in gone)
        )

    def _count_now(self) -> Counts:
        held = self._bytes
        return Counts(
            self._now,
            held[Shade.SHARED] + held[Shade.SHARED_MAPPED],
            held[Shade.MAPPED] + held[Shade.SHARED_MAPPED] + held[Shade.STALE],
            held[Shade.STALE],
        )

    def _add_count(self) -> None:
        counts = self._counts
        counts.append(self._count_now())
        if len(counts) > 2 * _MOST_COUNTS:
            pairs = zip(counts[::2], counts[1::2], strict=False)
            self._counts = [max(pair, key=lambda each: each.stale) for pair in pairs]
