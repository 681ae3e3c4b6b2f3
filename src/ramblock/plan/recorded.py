# SPDX-License-Identifier: Apache-2.0
"""
The facts of a recording: the guest's memory, its conversions, and its VMM's mappings.

If the trace has the guest's side (page attributes or page states) the conversions are taken from
that. Else the mappings of its busiest target are: a map is taken to make pages shared, an unmap to
make them private. Nothing is replayed here; see :mod:`~ramblock.plan.trace_plan`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice, takewhile

import msgspec

from ramblock.discard.attributes import PageState
from ramblock.plan.simulation import Place
from ramblock.plan.workload import Request
from ramblock.trace.events import (
    Attributes,
    Block,
    ConversionEnd,
    Detach,
    Event,
    Layout,
    Map,
    StateChange,
    Unmap,
)
from ramblock.trace.places import Places
from ramblock.trace.ranges import RangeMap
from ramblock.units import PAGE_SIZE

__all__ = ["Observed", "Recorded", "Steps"]

#: Largest guest address that can be placed: one process can reserve 128 TiB on x86.
_MOST_ADDRESS = 1 << 46
# Blocks of memory that a VMM makes; more in a row are conversions.
_MOST_DECLARED = 64


class Observed(msgspec.Struct):
    """The calls of a target in the trace."""

    name: str
    maps: int = 0
    unmaps: int = 0
    entries: int = 0
    """At the end of the trace, or before it went."""
    peak_entries: int = 0


class _Target:
    def __init__(self, name: str) -> None:
        self.observed = Observed(name)
        self.mappings: RangeMap[object] = RangeMap()
        self.steps = Steps()

    def map(self, event: Map) -> None:
        before = len(self.mappings.pieces(event.start, event.end))
        self.mappings.set(event.start, event.end, object())
        self._note(1 - before)
        self.observed.maps += 1

    def unmap(self, event: Unmap) -> None:
        around = self._pieces(event.start, event.end)
        self.mappings.set(event.start, event.end, None)
        self._note(self._pieces(event.start, event.end) - around)
        self.observed.unmaps += 1

    def _pieces(self, start: int, end: int) -> int:
        """Count the pieces of mappings in the range and at its edges."""
        return len(self.mappings.pieces(max(start - 1, 0), end + 1))

    def _note(self, more: int) -> None:
        observed = self.observed
        observed.entries += more
        observed.peak_entries = max(observed.peak_entries, observed.entries)


class Steps:
    """Conversions, in little memory: 25 bytes each."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._private = bytearray()
        self._times = array("d")

    def __len__(self) -> int:
        return len(self._private)

    def add(self, time: float, start: int, end: int, *, private: bool) -> None:
        """Add one; widened to whole pages."""
        # In pages: 2**64, where a range may end, would not fit.
        self._numbers.append(start // PAGE_SIZE)
        self._numbers.append(-(-end // PAGE_SIZE))
        self._private.append(private)
        self._times.append(time)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield where they are, as (start, end)."""
        for start, end in zip(self._numbers[::2], self._numbers[1::2], strict=True):
            yield start * PAGE_SIZE, end * PAGE_SIZE

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for (start, end), private, time in zip(
            self.ranges(), self._private, self._times, strict=True
        ):
            state = PageState.PRIVATE if private else PageState.SHARED
            yield time, Request(start, end - start, state)


class Recorded:
    """Takes events, in the order of the trace."""

    def __init__(self) -> None:
        self._began: int | None = None
        self._events = 0
        self._places = Places()
        self._blocks: list[Block] = []
        self._ends = False
        self._attributes = Steps()
        self._states = Steps()
        self._conversions = Steps()
        self._targets: dict[str, _Target] = {}
        self._gone: list[_Target] = []
        #: Of page states: how many could not be placed in the guest.
        self.unplaced = 0
        self._declared: set[tuple[int, int]] = set()

    def feed(self, events: list[Event]) -> None:
        """Take events."""
        for event in events:
            self._events += 1
            self._take(event, self._time(event))

    def _time(self, event: Event) -> float:
        """Seconds since the beginning; without times, the number of the event."""
        if event.time is None:
            return float(self._events)
        if self._began is None:
            self._began = event.time
        return (event.time - self._began) / 1e9

    def _take(self, event: Event, time: float) -> None:
        if isinstance(event, Map):
            if event.done and event.end > event.start:
                target = self._target(event.target)
                target.map(event)
                target.steps.add(time, event.start, event.end, private=False)
        elif isinstance(event, Unmap):
            self._unmap(event, time)
        elif isinstance(event, Attributes):
            if event.end > event.start:
                self._attributes.add(time, event.start, event.end, private=event.private)
        elif isinstance(event, StateChange):
            possible = self._places.of_block(event.block, event.start, event.end)
            self.unplaced += len(possible) != 1
            for start, end in possible[0] if len(possible) == 1 else ():
                if end > start:
                    self._states.add(time, start, end, private=event.private)
        elif isinstance(event, ConversionEnd):
            if event.result == "done" and event.end > event.start:
                self._conversions.add(time, event.start, event.end, private=event.private)
        elif isinstance(event, Layout):
            self._places.note(event)
            self._ends |= event.ends
            self._blocks += () if event.removed else event.blocks
        elif isinstance(event, Detach):
            gone = self._targets.pop(event.target, None)
            if gone is not None:
                self._gone.append(gone)

    def _unmap(self, event: Unmap, time: float) -> None:
        target = self._target(event.target)
        if not event.done or event.unmapped == 0:
            return
        end = min(event.end, 1 << 64)
        if event.unmapped is not None and event.start == 0 and end >= 1 << 63:
            # Everything at once.
            for start, piece_end, _ in list(target.mappings.items()):
                target.steps.add(time, start, piece_end, private=True)
        elif target.mappings.pieces(event.start, end):
            target.steps.add(time, event.start, end, private=True)
        target.unmap(event)

    def _target(self, name: str) -> _Target:
        return self._targets.setdefault(name, _Target(name))

    # -- results -----------------------------------------------------------------------------------

    @property
    def observed(self) -> list[Observed]:
        """The calls of each target, busiest first."""
        return [target.observed for target in self._by_calls()]

    def _by_calls(self) -> list[_Target]:
        targets = [*self._gone, *self._targets.values()]
        return sorted(targets, key=lambda target: -target.observed.maps)

    @property
    def from_mappings(self) -> bool:
        """Whether the trace has no guest's side, so that the mappings stand for it."""
        return not len(self._attributes) and not len(self._states)

    @property
    def steps(self) -> Steps:
        """The conversions."""
        if self.from_mappings:
            targets = self._by_calls()
            return targets[0].steps if targets else Steps()
        if self._ends and len(self._conversions):
            # Our own traces tell the end of each request; one that was rolled back is left out.
            return self._conversions
        return self._attributes if len(self._attributes) else self._states

    @property
    def told_layout(self) -> bool:
        """Whether the trace tells where the guest has memory, besides its conversions."""
        return bool(self._declared) or self.from_mappings

    def ends(self, request: Request) -> bool:
        """
        Whether *request* takes a place away rather than to convert it.

        A VMM that ends clears the attributes of its memory. Where the trace does not tell the end
        of a request, that looks like a guest that shares all of a place at once.
        """
        if self._ends or self.from_mappings or request.to is PageState.PRIVATE:
            return False
        return (request.gpa, request.size) in self._declared

    def places(self) -> list[Place]:
        """
        Find out where the guest has memory.

        From the trace's own layout where it has one, and from the ranges made private before
        anything is shared: a VMM does so with new memory. All other ranges lie in one place around
        them. If the mappings stand for the guest there is one place around all of them.
        """
        if self.from_mappings:
            end = max((end for _, end in self.steps.ranges()), default=0)
            return [Place(0, min(end, _MOST_ADDRESS), confidential=True)] if end else []
        known: RangeMap[object] = RangeMap()
        places = [*self._places_of_layout(known), *self._places_made_private(known)]
        self._declared = {(place.gpa, place.size) for place in places}
        places += self._places_around(known)
        return sorted(places, key=lambda place: place.gpa)

    def _places_of_layout(self, known: RangeMap[object]) -> Iterator[Place]:
        for block in self._blocks:
            start, end = (
                block.start // PAGE_SIZE * PAGE_SIZE,
                -(-block.end // PAGE_SIZE) * PAGE_SIZE,
            )
            if block.confidential is None or end > _MOST_ADDRESS or known.pieces(start, end):
                continue
            known.set(start, end, block)
            yield Place(start, end - start, block.confidential)

    def _places_made_private(self, known: RangeMap[object]) -> Iterator[Place]:
        first = [request for _, request in islice(self.steps, _MOST_DECLARED + 1)]
        made = list(takewhile(lambda request: request.to is PageState.PRIVATE, first))
        if len(made) > _MOST_DECLARED:
            return  # the trace begins in the middle of something
        for request in made:
            end = request.gpa + request.size
            if end <= _MOST_ADDRESS and not known.pieces(request.gpa, end):
                known.set(request.gpa, end, self)
                yield Place(request.gpa, request.size, confidential=True)

    def _places_around(self, known: RangeMap[object]) -> Iterator[Place]:
        low, high = _MOST_ADDRESS, 0
        for start, end in self.steps.ranges():
            if end <= _MOST_ADDRESS and known.gaps(start, end):
                low, high = min(low, start), max(high, end)
        if low < high:
            for start, end in known.gaps(low, high):
                yield Place(start, end - start, confidential=True)
