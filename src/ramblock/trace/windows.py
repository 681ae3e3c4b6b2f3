# SPDX-License-Identifier: Apache-2.0
"""
Conversions that are going on, and the windows that are open meanwhile.

A window is a range of pages of one target that is in a state in which it should not stay: private
and mapped, shared and not mapped. Every conversion passes through one of them, in any order of its
steps; it matters whether the window is closed when the conversion is over. So a window points to
its conversion, and is judged when it closes.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ramblock.trace.events import Source
from ramblock.trace.findings import FindingKind
from ramblock.trace.ranges import RangeMap

__all__ = ["ActiveConversion", "Conversions", "Window", "WindowMap"]


class ActiveConversion(msgspec.Struct, eq=False):
    """A conversion that has begun."""

    start: int
    end: int
    source: Source
    last: int
    """When its last step was seen."""
    vcpu: str | None
    asked: bool = False
    """Page states changed in it; else it is only an unmap that may become one."""
    over: bool = False
    held: bool = False
    """The trace has its begin and end (a request to virtio-mem): time does not end it."""


class Conversions:
    """
    The conversions that are going on.

    One is over at its end, if the trace has ends; at its vCPU's next entry, if entries are traced;
    else when nothing of it was seen for ``grace`` nanoseconds. There may be hundreds of the last
    kind at any time, so none of the calls below looks at all of them, but for :meth:`end_of`, whose
    sources have few.
    """

    def __init__(self, grace: int) -> None:
        self.grace = grace
        #: Those that are going on, oldest first.
        self.active: dict[ActiveConversion, None] = {}
        #: vCPUs whose entries are in the trace.
        self.entering: set[str] = set()
        #: Sources that tell each conversion's end.
        self.ending: set[str] = set()
        #: Conversions whose end was guessed.
        self.guessed = 0
        #: Which conversion a page is in; the newest, where two vCPUs convert the same page.
        self._where: RangeMap[ActiveConversion] = RangeMap()
        self._of_vcpu: dict[str, list[ActiveConversion]] = {}
        #: Each with the time at which it was last looked at; ascending. Those that time does not
        #: end are not in it.
        self._quiet: deque[tuple[int, ActiveConversion]] = deque()

    def step(
        self, start: int, end: int, time: int, source: Source, vcpu: str | None = None
    ) -> ActiveConversion:
        """
        Note a step on a range.

        Return the conversion that it belongs to, a new one if there is none.
        """
        found = self.find(start, end, vcpu)
        if found is None:
            found = ActiveConversion(start, end, source, time, vcpu)
            self.active[found] = None
            if end > start:
                self._where.set(start, end, found)
            self._quiet.append((time, found))
            if vcpu is not None:
                self._of_vcpu.setdefault(vcpu, []).append(found)
            return found
        found.last = time
        if start < found.start or end > found.end:
            found.start, found.end = min(start, found.start), max(end, found.end)
            self._where.set(found.start, found.end, found)
        if found.vcpu is None and vcpu is not None:
            found.vcpu = vcpu
            self._of_vcpu.setdefault(vcpu, []).append(found)
        return found

    def find(self, start: int, end: int, vcpu: str | None = None) -> ActiveConversion | None:
        """Find the conversion that a step on this range belongs to."""
        if not self.active or start >= end:
            return None
        for _, _, conversion in self._where.pieces(start, end):
            if vcpu is None or conversion.vcpu is None or conversion.vcpu == vcpu:
                return conversion
        return None

    def expire(self, time: int) -> None:
        """Let those end that have been quiet for too long."""
        quiet = self._quiet
        limit = time - self.grace
        while quiet and quiet[0][0] < limit:
            _, conversion = quiet.popleft()
            if conversion.over:
                continue
            if conversion.held:
                quiet.append((time, conversion))  # until its answer has come
            elif self._has_end(conversion):
                continue
            elif conversion.last >= limit:
                quiet.append((time, conversion))
            else:
                self._end(conversion)
                self.guessed += conversion.asked

    def _has_end(self, conversion: ActiveConversion) -> bool:
        """Whether the trace will tell when it is over."""
        return conversion.source.name in self.ending or (
            conversion.vcpu is not None and conversion.vcpu in self.entering
        )

    def end_of(self, source: Source) -> None:
        """End those of a source, which makes them one after the other."""
        for conversion in [each for each in self.active if each.source is source]:
            self._end(conversion)
        if not self.active:
            self._quiet.clear()

    def entry(self, vcpu: str) -> None:
        """End those of a vCPU, which goes on running the guest."""
        self.entering.add(vcpu)
        for conversion in self._of_vcpu.pop(vcpu, ()):
            if not conversion.over:
                self._end(conversion)

    def end_all_quiet(self, time: int) -> None:
        """End those that were quiet for too long, at the end of a trace with or without ends."""
        for conversion in [each for each in self.active if each.last + self.grace < time]:
            self._end(conversion)

    def _end(self, conversion: ActiveConversion) -> None:
        conversion.over = True
        del self.active[conversion]
        if conversion.vcpu in self._of_vcpu:
            self._of_vcpu[conversion.vcpu].remove(conversion)
        for start, end, value in self._where.pieces(conversion.start, conversion.end):
            if value is conversion:
                self._where.set(start, end, None)


class Window(msgspec.Struct, eq=False, gc=False):
    """A range of pages that is in a state in which it should not stay."""

    kind: FindingKind
    since: int
    source: Source
    line: int
    conversion: ActiveConversion | None
    """Its own; None: it has none, and nothing excuses it."""
    note: str = ""
    mapped: tuple[Source, int] | None = None


class WindowMap(RangeMap[Window]):
    """The open windows of one kind and target."""

    __slots__ = ()

    def open(self, start: int, end: int, window: Window) -> None:
        """Open a window over the parts that are in none."""
        for gap_start, gap_end in self.gaps(start, end):
            self.set(gap_start, gap_end, window)

    def take(self, start: int, end: int) -> list[tuple[int, int, Window]]:
        """Close the windows in a range; return them."""
        closed = self.pieces(start, end)
        if closed:
            self.set(start, end, None)
        return closed
