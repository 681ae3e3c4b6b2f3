# SPDX-License-Identifier: Apache-2.0
"""
The conversions of one guest that are going on.

Every conversion passes through a state in which pages and mappings do not agree, in any order of
its steps. It matters whether they agree when it is over, so it matters when that is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from ramblock.trace.events import Source
from ramblock.trace.ranges import RangeMap

__all__ = ["ActiveConversion", "Conversions"]

#: A conversion whose begin is in the trace gets this many times the grace: to change the attributes
#: of a GiB takes longer than anything between two steps (15 ms were seen).
_PATIENCE = 100
_FEW = 4


class ActiveConversion(msgspec.Struct, eq=False, gc=False):
    """A conversion that has begun."""

    start: int
    end: int
    source: Source
    last: int
    """When its last step was seen."""
    vcpu: str | None
    asked: bool = False
    """Page states changed in it; else it is only an unmap that may become one."""
    told: bool = False
    """The trace has its begin, and nothing yet that would mean its end."""
    over: bool = False
    guessed: bool = False
    """Nothing in the trace said that it is over, but that it was quiet."""
    held: bool = False
    """The trace has its begin and end (a request to virtio-mem): time does not end it."""
    before: Sequence[tuple[int, int, bool]] = ()
    """The states that its pages had: start, end, private. For one that turns out to have failed."""


class Conversions:
    """
    The conversions that are going on.

    One is over, whichever comes first:

    - at its end, if the trace has ends;
    - at its vCPU's next entry, or next conversion;
    - when its pages are given back to the host, which is a VMM's last step;
    - when nothing of it was seen for ``grace`` nanoseconds. If its begin is in the trace it gets a
      hundred times as long, until another begins whose thread is not known: that may be the same.

    There may be hundreds of the last kind at any time, so none of the calls below looks at all of
    them, but for :meth:`end_of`, whose sources have few.
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
        #: The newest of those whose begin is in the trace.
        self.newest: ActiveConversion | None = None
        #: Which conversion a page is in; the newest, where two vCPUs convert the same page. None:
        #: those that are going on are so few that they are looked through.
        self._where: RangeMap[ActiveConversion] | None = None
        self._of_vcpu: dict[str, list[ActiveConversion]] = {}
        #: Each with the time at which to look at it; ascending but for those with patience, which
        #: are in a queue of their own. Those that time does not end are in neither.
        self._quiet: deque[tuple[int, ActiveConversion]] = deque()
        self._told: deque[tuple[int, ActiveConversion]] = deque()

    def begin(self, start: int, end: int, time: int, source: Source, vcpu: str | None) -> None:
        """Note that a conversion begins, as its thread or the guest says."""
        if vcpu is not None:
            self._end_of_vcpu(vcpu)
        else:
            while self._told:  # by this thread or another, which is not known
                _, before = self._told.popleft()
                if before.over or not before.told:
                    continue
                before.told = False
                if before.last < time - self.grace:
                    self.end(before)
                else:
                    self._quiet.append((time, before))
        found = self._start(start, end, time, source, vcpu)
        found.told = True
        self.newest = found
        while self._told and self._told[0][1].over:  # nearly all are, long before their time
            self._told.popleft()
        self._told.append((time, found))

    def step(
        self, start: int, end: int, time: int, source: Source, vcpu: str | None = None
    ) -> ActiveConversion:
        """
        Note a step on a range.

        Return the conversion that it belongs to, a new one if there is none.
        """
        found = self.find(start, end, vcpu)
        if found is None:
            found = self._start(start, end, time, source, vcpu)
            self._quiet.append((time, found))
            return found
        found.last = time
        if not found.told and (start < found.start or end > found.end):
            found.start, found.end = min(start, found.start), max(end, found.end)
            if self._where is not None:
                self._where.set(found.start, found.end, found)
        if found.vcpu is None and vcpu is not None:
            found.vcpu = vcpu
            self._of_vcpu.setdefault(vcpu, []).append(found)
        return found

    def _start(
        self, start: int, end: int, time: int, source: Source, vcpu: str | None
    ) -> ActiveConversion:
        found = ActiveConversion(start, end, source, time, vcpu)
        self.active[found] = None
        if self._where is not None:
            if end > start:
                self._where.set(start, end, found)
        elif len(self.active) > _FEW:
            self._where = RangeMap()
            for each in self.active:
                if each.end > each.start:
                    self._where.set(each.start, each.end, each)
        if vcpu is not None:
            self._of_vcpu.setdefault(vcpu, []).append(found)
        return found

    def find(self, start: int, end: int, vcpu: str | None = None) -> ActiveConversion | None:
        """Find the conversion that a step on this range belongs to."""
        if not self.active or start >= end:
            return None
        if self._where is None:
            for each in reversed(self.active):
                if (
                    each.start < end
                    and start < each.end
                    and (vcpu is None or each.vcpu is None or each.vcpu == vcpu)
                ):
                    return each
            return None
        only = self._where.single(start, end)
        if only is None:
            return None
        if isinstance(only, ActiveConversion):
            fits = vcpu is None or only.vcpu is None or only.vcpu == vcpu
            return only if fits else None
        for _, _, conversion in self._where.some(start, end, 8):
            if vcpu is None or conversion.vcpu is None or conversion.vcpu == vcpu:
                return conversion
        return None

    def expire(self, time: int) -> None:
        """Let those end that have been quiet for too long."""
        if self._quiet and self._quiet[0][0] < time - self.grace:
            self._expire(self._quiet, time, self.grace)
        if self._told and self._told[0][0] < time - self.grace * _PATIENCE:
            self._expire(self._told, time, self.grace * _PATIENCE)

    def _expire(self, queue: deque[tuple[int, ActiveConversion]], time: int, grace: int) -> None:
        limit = time - grace
        while queue and queue[0][0] < limit:
            _, conversion = queue.popleft()
            if conversion.over:
                continue
            if conversion.held:
                queue.append((time, conversion))  # until its answer has come
            elif self._has_end(conversion):
                continue
            elif conversion.last >= limit:
                queue.append((time, conversion))
            else:
                conversion.guessed = True
                self.end(conversion)
                self.guessed += conversion.asked

    def _has_end(self, conversion: ActiveConversion) -> bool:
        """Whether the trace will tell when it is over."""
        return conversion.source.name in self.ending or (
            conversion.vcpu is not None and conversion.vcpu in self.entering
        )

    def end_of(self, source: Source) -> None:
        """End those of a source, which makes them one after the other."""
        for conversion in [each for each in self.active if each.source is source]:
            self.end(conversion)
        if not self.active:
            self._quiet.clear()
            self._told.clear()

    def entry(self, vcpu: str) -> None:
        """End those of a vCPU, which goes on running the guest."""
        self.entering.add(vcpu)
        self._end_of_vcpu(vcpu)

    def _end_of_vcpu(self, vcpu: str) -> None:
        for conversion in self._of_vcpu.pop(vcpu, ()):
            if not conversion.over:
                self.end(conversion)

    def end_all_quiet(self, time: int | None) -> None:
        """
        End those that were quiet for the grace, where the trace ends at *time*.

        None: the trace has no times, and all are over.
        """
        for conversion in [
            each for each in self.active if time is None or each.last + self.grace < time
        ]:
            conversion.guessed = time is not None
            self.end(conversion)

    def end_unless_told(self, conversion: ActiveConversion) -> None:
        """End one whose end the trace does not tell in other words."""
        if not conversion.held and not self._has_end(conversion):
            self.end(conversion)

    def end(self, conversion: ActiveConversion) -> None:
        """End one that is going on."""
        conversion.over = True
        conversion.before = ()
        del self.active[conversion]
        if conversion.vcpu in self._of_vcpu:
            self._of_vcpu[conversion.vcpu].remove(conversion)
        if self._where is None:
            return
        if not self.active:
            self._where = None
            return
        start, end = conversion.start, conversion.end
        if self._where.single(start, end) is conversion:
            self._where.set(start, end, None)
            return
        for low, high, value in self._where.pieces(start, end):
            if value is conversion:
                self._where.set(low, high, None)
