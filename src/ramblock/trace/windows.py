# SPDX-License-Identifier: Apache-2.0
"""
Conversions that are going on, and the windows that are open meanwhile.

A window is a range of pages of one target that is in a state in which it should not stay: private and mapped, shared and not mapped.
Every conversion passes through one of them, whatever the order of its steps; what matters is whether the window is closed when the
conversion is over. So a window points to its conversion, and is judged when it closes.
"""

from __future__ import annotations

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
    """The trace has its beginning and will have its end (a request to virtio-mem): time does not end it."""


class Conversions:
    """
    The conversions that are going on.

    One is over at its end, if the trace has ends; at its vCPU's next entry, if entries are traced; else when nothing of it was seen
    for ``grace`` nanoseconds.
    """

    def __init__(self, grace: int) -> None:
        self.grace = grace
        self.active: list[ActiveConversion] = []
        #: vCPUs whose entries are in the trace.
        self.entering: set[str] = set()
        #: Sources that tell each conversion's end.
        self.ending: set[str] = set()
        #: Conversions whose end was guessed.
        self.guessed = 0
        self._next = 0

    def step(
        self, start: int, end: int, time: int, source: Source, vcpu: str | None = None
    ) -> ActiveConversion:
        """Note a step on a range; return the conversion that it belongs to, a new one if there is none."""
        found = self.find(start, end, vcpu)
        if found is None:
            if not self.active:
                self._next = time + self.grace
            found = ActiveConversion(start, end, source, time, vcpu)
            self.active.append(found)
        else:
            found.last = time
            if start < found.start:
                found.start = start
            if end > found.end:
                found.end = end
            if found.vcpu is None:
                found.vcpu = vcpu
        return found

    def find(self, start: int, end: int, vcpu: str | None = None) -> ActiveConversion | None:
        """Find the conversion that a step on this range belongs to."""
        for conversion in self.active:
            if (
                conversion.start < end
                and start < conversion.end
                and (vcpu is None or conversion.vcpu is None or conversion.vcpu == vcpu)
            ):
                return conversion
        return None

    def expire(self, time: int) -> None:
        """Let those end that have been quiet for too long."""
        if not self.active or time <= self._next:
            return
        kept = []
        for conversion in self.active:
            if conversion.last + self.grace < time and not self.has_end(conversion):
                conversion.over = True
                self.guessed += conversion.asked
            else:
                kept.append(conversion)
        self.active = kept
        self._next = min((each.last for each in kept), default=time) + self.grace

    def has_end(self, conversion: ActiveConversion) -> bool:
        """Whether the trace will tell when it is over."""
        return (
            conversion.held
            or conversion.source.name in self.ending
            or (conversion.vcpu is not None and conversion.vcpu in self.entering)
        )

    def end_of(self, source: Source) -> None:
        """End those of a source, which makes them one after the other."""
        if len(self.active) == 1 and self.active[0].source is source:
            self.active[0].over = True
            self.active.clear()
            return
        kept = []
        for conversion in self.active:
            if conversion.source is source:
                conversion.over = True
            else:
                kept.append(conversion)
        self.active = kept

    def entry(self, vcpu: str) -> None:
        """End the one of a vCPU."""
        for conversion in self.active:
            if conversion.vcpu == vcpu:
                conversion.over = True
                self.active.remove(conversion)
                return

    def end_all_quiet(self, time: int) -> None:
        """At the end of the trace: let all end that were quiet for too long, whether the trace has ends or not."""
        for conversion in self.active:
            if conversion.last + self.grace < time:
                conversion.over = True


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
        """Open a window over what is not in one already."""
        for gap_start, gap_end in self.gaps(start, end):
            self.set(gap_start, gap_end, window)

    def take(self, start: int, end: int) -> list[tuple[int, int, Window]]:
        """Close the windows in a range; return them."""
        closed = self.pieces(start, end)
        if closed:
            self.set(start, end, None)
        return closed
