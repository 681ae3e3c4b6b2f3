# SPDX-License-Identifier: Apache-2.0
"""
A guest's needs by simulation. The conversions go through the real guest memory and mapper.

One guest memory has three mappers, since no more differ in their calls: one mapping per page on a
target that wants whole mappings back in any number (type1, vhost-vdpa), one per page on a target
that wants each back by itself (iommufd, vfio-user), and one per run on a target that cuts
(iommufd-cutting). The memory is real too, but nobody writes to it, so it costs nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType

import msgspec

from ramblock.bitmap import SparseBitmap
from ramblock.discard.attributes import PageState
from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaCapabilities, HostRange, MappingPolicy
from ramblock.errors import DmaError, describe_range
from ramblock.guest import GuestMemory
from ramblock.guest.block import RamBlock
from ramblock.plan.guest import Guest
from ramblock.plan.targets import TargetKind
from ramblock.plan.workload import End, Request, boot_requests, steady_requests
from ramblock.units import ADDRESS_LIMIT, GIB, MIB, PAGE_SIZE

__all__ = ["Counts", "Place", "Simulated", "Simulation", "kind_of", "simulate"]

_HIGH_START = 4 * GIB
_MOST_POINTS = 2_000
_TABLE = 2 * MIB  # span of one table of the last level


class Place(msgspec.Struct, frozen=True):
    """Where the guest has memory."""

    gpa: int
    size: int
    confidential: bool


class Counts(msgspec.Struct):
    """Counts of one mapper; it made one call to its target for each of these."""

    entries: int = 0
    peak_entries: int = 0
    maps: int = 0
    unmaps: int = 0
    mapped: int = 0
    """Bytes."""
    tables: int = 0
    """Tables of an IOMMU's last level: pieces of 2 MiB of guest addresses that were ever mapped."""


class Simulated(msgspec.Struct, kw_only=True):
    """The outcome of a simulation; by the names that :func:`kind_of` gives."""

    boot: dict[str, Counts]
    """When the guest is up; of a trace: before its first conversion."""
    final: dict[str, Counts]
    conversions: int
    shared: int
    """Bytes that are shared at the end."""
    peak_shared: int
    series: list[tuple[float, int, int, int]]
    """
    Time or number of the conversion, bytes shared, mappings by page, mappings by run.

    Peaks are kept when it is thinned.
    """


def kind_of(target: TargetKind, policy: MappingPolicy) -> str:
    """Name the mapper whose calls are those of *policy* on *target*."""
    if policy is MappingPolicy.RUN:
        return "run"
    return "page-exact" if target.exact else "page"


class _Target:
    """
    An IOMMU that knows which pages are mapped and nothing else: enough for a count, and fast.

    It also counts the tables that a hardware one would have.
    """

    def __init__(self, *, cuts: bool, exact: bool) -> None:
        self.capabilities = DmaCapabilities(cut=cuts, exact=exact)
        self._mapped = SparseBitmap(ADDRESS_LIMIT // PAGE_SIZE)
        self._tables = SparseBitmap(ADDRESS_LIMIT // _TABLE)

    @property
    def tables(self) -> int:
        return self._tables.count(0, ADDRESS_LIMIT // _TABLE)

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        end = iova + memory.size
        if self._mapped.set(iova // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE != memory.size:
            raise DmaError(errno.EEXIST, f"{describe_range(iova, memory.size)} is mapped")
        self._tables.set(iova // _TABLE, (end - 1) // _TABLE + 1)

    def unmap(self, iova: int, size: int) -> int:
        return self._mapped.clear(iova // PAGE_SIZE, (iova + size) // PAGE_SIZE) * PAGE_SIZE

    def close(self) -> None:
        self._mapped.clear(0, ADDRESS_LIMIT // PAGE_SIZE)


class _Watched:
    """One mapper and the most it ever had."""

    def __init__(self, mapper: Mapper, target: _Target) -> None:
        self.mapper = mapper
        self._target = target
        self._peak = 0

    def look(self) -> int:
        entries = self.mapper.entries
        self._peak = max(self._peak, entries)
        return entries

    def counts(self) -> Counts:
        mapper = self.mapper
        return Counts(
            self.look(),
            self._peak,
            mapper.map_calls,
            mapper.unmap_calls,
            mapper.mapped_bytes,
            self._target.tables,
        )


class _ByPage:
    """
    The work of a mapper with one mapping per page, derived from the one with runs.

    A mapping is a page, so there are as many mappings as pages mapped, and as many calls as pages
    were mapped. To unmap, it makes the calls of the other one, or one for each page where the
    target is exact.
    """

    def __init__(self, by_run: _Watched, *, exact: bool) -> None:
        self._by_run = by_run
        self._exact = exact
        self._maps = by_run.mapper.mapped_bytes // PAGE_SIZE
        self._peak = 0

    def shared(self, size: int) -> None:
        self._maps += size // PAGE_SIZE

    def look(self) -> int:
        entries = self._by_run.mapper.mapped_bytes // PAGE_SIZE
        self._peak = max(self._peak, entries)
        return entries

    def counts(self) -> Counts:
        run = self._by_run.counts()
        entries = self.look()
        unmaps = self._maps - entries if self._exact else run.unmaps
        return Counts(entries, self._peak, self._maps, unmaps, run.mapped, run.tables)


class Simulation:
    """
    A guest memory with the three mappers; a context manager, since it holds memory descriptors.

    :param places: Where the guest has memory; they must not overlap.
    :param count_pages: Count the work of mappers with one mapping per page from that of the one
        with runs: the same numbers without a call for each page, for guests that map terabytes.
    """

    def __init__(self, places: Iterable[Place], *, count_pages: bool = False) -> None:
        self._stack = ExitStack()
        self._conversions = 0
        self._peak_shared = 0
        self._series: list[tuple[float, int, int, int]] = []
        self._boot: dict[str, Counts] = {}
        with ExitStack() as stack:
            self._memory = GuestMemory()
            self._blocks = []
            for number, place in enumerate(places):
                block = RamBlock.create(
                    f"ram{number}", place.size, private="stand-in" if place.confidential else None
                )
                stack.callback(block.close)
                self._memory.map(block, place.gpa, readonly=not place.confidential)
                self._blocks.append(block)
            by_run = self._attach(cuts=True, exact=False, policy=MappingPolicy.RUN)
            self._counting: list[_ByPage] = []
            self._watched: dict[str, _Watched | _ByPage] = {}
            for name, exact in (("page", False), ("page-exact", True)):
                if count_pages:
                    counted = _ByPage(by_run, exact=exact)
                    self._counting.append(counted)
                    self._watched[name] = counted
                else:
                    self._watched[name] = self._attach(
                        cuts=False, exact=exact, policy=MappingPolicy.PAGE
                    )
            self._watched["run"] = by_run
            stack.callback(self._detach)
            self._stack = stack.pop_all()
        self.note(0.0)

    def _attach(self, *, cuts: bool, exact: bool, policy: MappingPolicy) -> _Watched:
        target = _Target(cuts=cuts, exact=exact)
        return _Watched(self._memory.attach(target, policy), target)

    def _detach(self) -> None:
        for mapper in self._memory.mappers:
            self._memory.detach(mapper)

    def convert(self, request: Request) -> None:
        """
        Convert.

        :raises UsageError: The guest has no memory there. Nothing has changed.
        """
        result = self._memory.convert(request.gpa, request.size, request.to)
        if request.to is PageState.SHARED:
            for counted in self._counting:
                counted.shared(result.changed_bytes)
        self._conversions += 1

    def covers(self, request: Request) -> bool:
        """Whether the guest has memory that can be converted in all of the range."""
        position, end = request.gpa, request.gpa + request.size
        for section in self._memory.sections:
            if position < end and section.gpa <= position < section.gpa_end:
                if section.block.private is None:
                    return False
                position = section.gpa_end
        return position >= end

    def note(self, time: float) -> None:
        """Take a point for the picture, and see whether this is a peak."""
        shared = self.shared
        self._peak_shared = max(self._peak_shared, shared)
        by_page, _, by_run = (watched.look() for watched in self._watched.values())
        self._series.append((time, shared, by_page, by_run))
        if len(self._series) > 2 * _MOST_POINTS:
            kept = self._series
            pairs = zip(kept[:-1:2], kept[1:-1:2], strict=False)
            self._series = [max(pair, key=lambda point: point[3]) for pair in pairs] + kept[-1:]

    def end_boot(self) -> None:
        """Take the counts of now for those of boot."""
        self._boot = self._counts()

    @property
    def shared(self) -> int:
        """Bytes that are shared now."""
        total = 0
        for block in self._blocks:
            total += block.size if block.attributes is None else block.attributes.shared_bytes
        return total

    def result(self) -> Simulated:
        """Sum up."""
        return Simulated(
            boot=self._boot,
            final=self._counts(),
            conversions=self._conversions,
            shared=self.shared,
            peak_shared=self._peak_shared,
            series=list(self._series),
        )

    def _counts(self) -> dict[str, Counts]:
        return {name: watched.counts() for name, watched in self._watched.items()}

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def simulate(
    guest: Guest,
    end: End = End.EXPECTED,
    *,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Simulated:
    """
    Boot *guest* and let it convert, at one end of the ranges.

    :param progress: Called with the number of conversions since the last call.
    :raises UsageError: The guest has less memory than it would share.
    """
    low = min(guest.memory, 2 * GIB)
    places = [Place(0, low, confidential=True)]
    if guest.memory > low:
        places.append(Place(_HIGH_START, guest.memory - low, confidential=True))
    with Simulation(places) as simulation:
        number = 0

        def run(requests: Iterable[Request]) -> None:
            nonlocal number
            for request in requests:
                simulation.convert(request)
                number += 1
                simulation.note(number)
                if progress is not None and not number % 500:
                    progress(500)

        run(boot_requests(guest, end))
        simulation.end_boot()
        run(steady_requests(guest, seed))
        return simulation.result()
