# SPDX-License-Identifier: Apache-2.0
"""
The verifier: a picture of what was *seen* at the edges of a guest, and a judgement of each call.

It knows neither blocks nor states nor sections, and shares no code with what it watches. The edges
(:mod:`ramblock.testing.edges`) tell it of every call of a target, of the attributes and of the
backings, before or after it is made; it marks pages, and compares. So it judges the order of calls
and the effect of failures, not anybody's books. The other half is :mod:`ramblock.testing.model`:
what *ought* to be, given what was asked for.

Four pictures, by page: the attribute of guest pages; for each target the IOVAs that it maps, and
the host memory behind them; of host memory what is freed, and what is private in place. IOVAs are
guest addresses, as everywhere here. A call costs the pages that it names, not those of the guest;
only targets that can list their mappings, and that the verifier was told to ask, are walked
through after each of their calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from threading import Lock, get_ident
from time import perf_counter_ns
from typing import NamedTuple

from ramblock.dma.target import HostRange
from ramblock.testing.changes import Changes
from ramblock.testing.marks import MarkedPages, Marks, Stretches
from ramblock.testing.reach import MAPPED, PERHAPS, Listing, Reach
from ramblock.testing.violations import Violation, ViolationKind, ViolationLog
from ramblock.units import PAGE_SIZE

__all__ = ["Region", "Verifier"]

_PRIVATE = 1
_SHARED = 2
_FREED = 1


class Region(NamedTuple):
    """A place in the guest that has memory from the beginning, all of it private or all shared."""

    gpa: int
    size: int
    confidential: bool


class Verifier:
    """
    The picture, and what was wrong.

    :param regions: What :meth:`compare` compares, and what begins private. Elsewhere a page is
        neither private nor shared until it was made so.
    :param targets: Names of targets, for those whose calls are reported without :meth:`watch`.
    """

    def __init__(self, regions: Sequence[Region] = (), targets: Iterable[str] = ()) -> None:
        #: The guest is being reset: private memory that it used is freed.
        self.resetting = False
        self._log = ViolationLog()
        self._flag = self._log.note
        #: How often each kind happened.
        self.counts = self._log.counts
        #: What was wrong, oldest first, in words; the first thousand.
        self.story = self._log.story
        #: How many calls were looked at.
        self.checks = 0
        self._regions = regions
        self._targets = {name: Reach() for name in targets}
        self._attribute = Marks()
        self._memory = Marks()
        self._freed = Marks()
        self._paint_attribute(self._attribute, ())
        #: Guest pages whose attribute is private, by guest address.
        self.private_pages = MarkedPages(self._attribute, _PRIVATE)
        #: Pages of memory in place whose attribute is private, by host address.
        self.private_memory = MarkedPages(self._memory, _PRIVATE)
        #: Pages of shared backings that were freed and not mapped since, by host address.
        self.freed_pages = MarkedPages(self._freed, _FREED)
        self._changes = Changes()
        self._spent: Counter[int] = Counter()
        self._lock = Lock()

    def watch(self, target: str, listing: Listing | None = None) -> None:
        """Take in a target by name; with *listing*, its own list is compared after each call."""
        self._targets[target] = Reach(listing)

    def spent_ns(self) -> int:
        """Nanoseconds that all threads together spent in here."""
        return self._spent.total()

    def spent_here_ns(self) -> int:
        """Nanoseconds that the calling thread spent in here."""
        return self._spent[get_ident()]

    # -- targets ----------------------------------------------------------------------------------

    def about_to_map(self, target: str, iova: int, memory: HostRange) -> None:
        """Check a map before it is made: no page of it is private."""
        size = memory.size
        with self._lock, self._timed():
            private = self._attribute.where(_PRIVATE, iova, iova + size)
            if self._memory:
                shift = iova - memory.address
                in_place = self._memory.where(_PRIVATE, memory.address, memory.address + size)
                private = chain(private, ((low + shift, high + shift) for low, high in in_place))
            self._flag(ViolationKind.STALE, target, private, "map", iova, size)

    def has_mapped(self, target: str, iova: int, memory: HostRange) -> None:
        """Note a map that was made: nothing may have been mapped there."""
        size = memory.size
        with self._lock, self._timed():
            reach = self._targets[target]
            twice = reach.mapped.where(MAPPED, iova, iova + size)
            self._flag(ViolationKind.DOUBLE, target, twice, "map", iova, size)
            self._note_map(reach, MAPPED, iova, memory)

    def may_have_mapped(self, target: str, iova: int, memory: HostRange) -> None:
        """Note a map of which nobody knows whether it was made."""
        with self._lock, self._timed():
            self._note_map(self._targets[target], PERHAPS, iova, memory)

    def _note_map(self, reach: Reach, mark: int, iova: int, memory: HostRange) -> None:
        reach.note(mark, iova, memory)
        # To pin a hole is to fill it: what was freed here is fresh memory now.
        self._freed.put(0, memory.address, memory.address + memory.size)

    def has_unmapped(self, target: str, iova: int, size: int, told: object) -> None:
        """Note an unmap that was made, and check the bytes it told."""
        end = iova + size
        with self._lock, self._timed():
            mapped = self._targets[target].mapped
            known = mapped.count(MAPPED, iova, end) * PAGE_SIZE
            perhaps = mapped.count(PERHAPS, iova, end) * PAGE_SIZE
            mapped.put(0, iova, end)
            if type(told) is not int or not known <= told <= known + perhaps:
                self._flag_range(ViolationKind.UNMAP_COUNT, target, iova, size, "unmap")

    def may_have_unmapped(self, target: str, iova: int, size: int) -> None:
        """Note an unmap of which nobody knows whether it was made; the next one settles it."""
        end = iova + size
        with self._lock, self._timed():
            mapped = self._targets[target].mapped
            for start, stop in list(mapped.where(MAPPED, iova, end)):
                mapped.put(PERHAPS, start, stop)

    def has_closed(self, target: str) -> None:
        """Note that a target maps nothing any more."""
        with self._lock, self._timed():
            self._targets[target].clear()

    def ask(self, target: str, call: str, iova: int, size: int) -> None:
        """Compare the list of a target, where it has one, with what was seen: after each call."""
        reach = self._targets[target]
        if reach.listing is None:
            return
        with self._lock, self._timed():
            painted = _paint((mapping.iova, mapping.size) for mapping in reach.listing())
            for start, end in list(reach.mapped.everywhere(PERHAPS)):
                # Now somebody knows.
                reach.mapped.put(0, start, end)
                for low, high in painted.where(MAPPED, start, end):
                    reach.mapped.put(MAPPED, low, high)
            differing = _differing(painted, reach.mapped)
            self._flag(ViolationKind.UNMAP_COUNT, target, differing, call, iova, size)

    def maps_memory(self, address: int, size: int) -> bool:
        """Whether any target maps a byte of host memory ``[address, address + size)``."""
        with self._lock:
            return any(any(reach.to_memory(address, size)) for reach in self._targets.values())

    # -- attributes -------------------------------------------------------------------------------

    def about_to_make_private(self, gpa: int, size: int) -> None:
        """Note that an attribute becomes private, and check: no target maps it."""
        end = gpa + size
        with self._lock, self._timed():
            self._changes.add(self._attribute.elsewhere(_PRIVATE, gpa, end))
            for target, reach in self._targets.items():
                mapped = reach.mapped.where(MAPPED, gpa, end)
                self._flag(ViolationKind.STALE, target, mapped, "private attribute", gpa, size)
            self._attribute.put(_PRIVATE, gpa, end)

    def has_made_shared(self, gpa: int, size: int) -> None:
        """Note that an attribute has become shared."""
        with self._lock, self._timed():
            self._attribute.put(_SHARED, gpa, gpa + size)

    def about_to_make_memory_private(self, address: int, size: int) -> None:
        """Note, of memory in place, what :meth:`about_to_make_private` does of guest pages."""
        with self._lock, self._timed():
            self._flag_mapped_memory(ViolationKind.STALE, address, size, "private in place")
            self._memory.put(_PRIVATE, address, address + size)

    def has_made_memory_shared(self, address: int, size: int) -> None:
        """Note that memory in place has become shared."""
        with self._lock, self._timed():
            self._memory.put(0, address, address + size)

    # -- freeing ----------------------------------------------------------------------------------

    def about_to_free_shared(self, address: int, size: int, gpa: int | None = None) -> None:
        """
        Note a free of the shared side, and check: no target maps it.

        :param gpa: Where the guest has it, if it has it in one place; then nothing of it is shared.
        """
        with self._lock, self._timed():
            self._flag_mapped_memory(ViolationKind.FREED, address, size, "free")
            self._freed.put(_FREED, address, address + size)
            if gpa is not None:
                used = self._attribute.where(_SHARED, gpa, gpa + size)
                self._flag(ViolationKind.LOST_FREE, "", used, "free of the shared side", gpa, size)

    def has_given_back(self, address: int, size: int) -> None:
        """Note that host memory is gone; the next to come there may have the same addresses."""
        with self._lock:
            self._freed.put(0, address, address + size)
            self._memory.put(0, address, address + size)

    def about_to_free_private(self, gpa: int, size: int) -> None:
        """Check a free of the private side, which the guest has at *gpa*: nothing is private."""
        with self._lock, self._timed():
            if not self.resetting:
                used = self._attribute.where(_PRIVATE, gpa, gpa + size)
                self._flag(ViolationKind.LOST_FREE, "", used, "free of the private side", gpa, size)

    # -- devices ----------------------------------------------------------------------------------

    def before_access(self) -> int:
        """Take a time stamp before a device's access, for :meth:`device_reached`."""
        with self._lock:
            return self._changes.stamp()

    def device_reached(self, target: str, gpa: int, size: int, since: int) -> None:
        """
        Check an access that succeeded: no page of it was private all the while.

        A page that became private during the access may have been reached before, rightly; that is
        what *since* is for.
        """
        with self._lock, self._timed():
            private = self._attribute.where(_PRIVATE, gpa, gpa + size)
            wrong = self._changes.without_those_since(private, since)
            self._flag(
                ViolationKind.DEVICE_REACHED_PRIVATE, target, iter(wrong), "access", gpa, size
            )

    def violation(
        self, kind: ViolationKind, target: str, gpa: int, size: int, call: str = "seen"
    ) -> None:
        """Note a violation that somebody else saw."""
        with self._lock, self._timed():
            self._flag_range(kind, target, gpa, size, call)

    def note_time(self, nanoseconds: int) -> None:
        """Note time that the calling thread spent in here."""
        self._spent[get_ident()] += nanoseconds

    # -- at the end -------------------------------------------------------------------------------

    def compare(
        self,
        shared: Iterable[tuple[int, int]],
        mappings: dict[str, list[tuple[int, int]]],
        *,
        attached: bool,
    ) -> None:
        """
        Compare everything: page states with attributes, and each target's table with both.

        :param shared: What the memory says is shared, as (gpa, size).
        :param mappings: What each target says is mapped, as (iova, size). Of one that does not say
            it is what was seen to be mapped.
        :param attached: Whether the targets are meant to map exactly what is shared.
        """
        with self._lock, self._timed():
            says = Marks()
            self._paint_attribute(says, shared)
            wrong = (
                stretch
                for mark in (_PRIVATE, _SHARED)
                for low, high in says.everywhere(mark)
                for stretch in self._attribute.elsewhere(mark, low, high)
            )
            self._flag(ViolationKind.STATE, "", wrong if says != self._attribute else iter(()))
            for target, reach in self._targets.items():
                painted = reach.mapped
                if target in mappings:
                    painted = _paint(mappings[target])
                    differing = _differing(painted, reach.mapped)
                    self._flag(ViolationKind.UNMAP_COUNT, target, differing)
                stale = (
                    stretch
                    for low, high in painted.everywhere(MAPPED)
                    for stretch in self._attribute.where(_PRIVATE, low, high)
                )
                self._flag(ViolationKind.STALE, target, stale)
                if attached:
                    missing = (
                        stretch
                        for low, high in self._attribute.everywhere(_SHARED)
                        for stretch in painted.elsewhere(MAPPED, low, high)
                    )
                    self._flag(ViolationKind.MISSING, target, missing)

    def violations(self) -> list[Violation]:
        """List what was found, as ranges: worst kind first, then largest first, so many of each."""
        with self._lock:
            return self._log.ranges()

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.counts

    # -- the naive part ---------------------------------------------------------------------------

    def _timed(self) -> _Timed:
        return _Timed(self)

    def _paint_attribute(self, canvas: Marks, shared: Iterable[tuple[int, int]]) -> None:
        for gpa, size, confidential in self._regions:
            canvas.put(_PRIVATE if confidential else _SHARED, gpa, gpa + size)
        for gpa, size in shared:
            canvas.put(_SHARED, gpa, gpa + size)

    def _flag_mapped_memory(self, kind: ViolationKind, address: int, size: int, call: str) -> None:
        for target, reach in self._targets.items():
            self._flag(kind, target, reach.to_memory(address, size), call, address, size)

    def _flag_range(self, kind: ViolationKind, target: str, gpa: int, size: int, call: str) -> None:
        self._flag(kind, target, iter(((gpa, gpa + size),)), call, gpa, size)


def _paint(ranges: Iterable[tuple[int, int]]) -> Marks:
    canvas = Marks()
    for start, size in ranges:
        canvas.put(MAPPED, start, start + size)
    return canvas


def _differing(listed: Marks, seen: Marks) -> Stretches:
    """Yield what only one of them calls mapped; what is seen as perhaps mapped may be either."""
    if listed == seen:
        return
    for start, end in listed.everywhere(MAPPED):
        for low, high in seen.elsewhere(MAPPED, start, end):
            yield from seen.elsewhere(PERHAPS, low, high)
    for start, end in seen.everywhere(MAPPED):
        yield from listed.elsewhere(MAPPED, start, end)


class _Timed:
    """
    A clock for what is done under the verifier's lock; it does not count waiting for it.

    The lock itself is taken by a ``with`` of its own: taken in here, it would stay taken where
    Ctrl-C comes before the ``with`` has begun.
    """

    __slots__ = ("_start", "_verifier")

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def __enter__(self) -> None:
        self._start = perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._verifier.checks += 1
        self._verifier.note_time(perf_counter_ns() - self._start)
