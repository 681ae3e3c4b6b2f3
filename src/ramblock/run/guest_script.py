# SPDX-License-Identifier: Apache-2.0
"""
The guest's script: a stream of conversion requests, made from a workload and a seed.

The stream depends on the seed and on the answers, never on time or on the devices, so that a run
can be repeated. A buffer is shared before a device gets it and taken back before it is made
private, as a driver does; the hostile requests go to a part of memory of their own, and to
addresses where nothing is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ramblock.discard.attributes import PageState
from ramblock.run.device import Buffer
from ramblock.run.layout import BlockPlace
from ramblock.run.scenario import Workload
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE

__all__ = ["Action", "GuestScript", "Request"]

_SLICE = 2 * MIB  # TDX_MAP_GPA_MAX_LEN, arch/x86/kvm/vmx/tdx.c
_SHARED, _PRIVATE = PageState.SHARED, PageState.PRIVATE


class Action(Enum):
    """The purpose of a request."""

    SWIOTLB = "swiotlb"
    RING = "ring"
    ALLOC = "alloc"
    FREE = "free"
    ACCEPT = "accept"
    HOSTILE = "hostile"
    REBOOT = "reboot"
    """Not a conversion: the guest is reset, and boots again."""


class Request(NamedTuple):
    """One request to convert, and the buffer that it is about."""

    gpa: int
    size: int
    to: PageState
    action: Action
    buffer: Buffer | None = None


@dataclass(frozen=True)
class _Zones:
    """Who uses which part of the guest's memory, as (gpa, size)."""

    swiotlb: tuple[int, int]
    rings: tuple[int, int]
    buffers: tuple[int, int]
    accept: tuple[int, int]
    forbidden: tuple[int, int]
    hostile: tuple[int, int]


def swiotlb_size(memory: int) -> int:
    """Bytes of the bounce buffer pool: 6 % of RAM, 64 MiB to 1 GiB (arch/x86/mm/mem_encrypt.c)."""
    return min(max(memory * 6 // 100, 64 * MIB), GIB) // _SLICE * _SLICE


class GuestScript:
    """
    The guest of one run.

    :param workload: Its actions.
    :param places: Its blocks.
    :param devices: How many devices it has.
    :param seed: Same seed, same requests.
    """

    def __init__(
        self, workload: Workload, places: list[BlockPlace], devices: int, seed: int
    ) -> None:
        self._workload = workload
        self._devices = devices
        self._random = random.Random(f"{seed}/guest")
        self._places = {place.name: place for place in places}
        self._zones = self._plan_zones()
        self._live: list[Buffer] = []
        self._live_bytes = 0
        self._free_slots = self._plan_slots()
        self._accepted = 0
        self._rebooted = False
        steady = workload.steady
        self._actions = (
            Action.ALLOC,
            Action.FREE,
            Action.ACCEPT,
            Action.HOSTILE,
            Action.REBOOT,
        )
        self._weights = (steady.alloc, steady.free, steady.accept, steady.hostile, steady.reboot)

    @property
    def forbidden(self) -> tuple[int, int]:
        """Memory that the guest never shares, as (gpa, size)."""
        return self._zones.forbidden

    def _plan_zones(self) -> _Zones:
        low, high0, high1 = (self._places[name] for name in ("low", "high0", "high1"))
        memory = low.size + high0.size + high1.size
        pool = (
            min(swiotlb_size(memory), low.size // 4 // _SLICE * _SLICE)
            if self._workload.boot.swiotlb
            else 0
        )
        rings = self._workload.boot.rings * self._devices * self._workload.boot.ring_size
        first = low.size // 8 // _SLICE * _SLICE
        start = first + pool + -(-rings // _SLICE) * _SLICE
        border = high1.gpa
        reach = min(32 * MIB, high0.size // 4, high1.size // 4) // _SLICE * _SLICE
        return _Zones(
            swiotlb=(first, pool),
            rings=(first + pool, rings),
            buffers=(start, low.size - start),
            accept=(border + reach, high1.size - reach),
            forbidden=(high0.gpa, high0.size - reach),
            hostile=(border - reach, 2 * reach),
        )

    def _plan_slots(self) -> dict[int, list[int]]:
        """
        Free places of each buffer size.

        Each size has its own part of the zone, small ones the first.
        """
        buffers = self._workload.buffers
        sizes = []
        size = int(buffers.min_size)
        while size <= buffers.max_size:
            sizes.append(size)
            size *= 2
        gpa, room = self._zones.buffers
        share = room // len(sizes)
        slots = {}
        for index, size in enumerate(sizes):
            start = -(-(gpa + index * share) // size) * size
            count = min((gpa + (index + 1) * share - start) // size, int(buffers.live) // size)
            slots[size] = [start + number * size for number in range(count - 1, -1, -1)]
        return slots

    # -- boot --------------------------------------------------------------------------------------

    def boot(self) -> Iterator[Request]:
        """Yield the guest's requests at boot."""
        gpa, size = self._zones.swiotlb
        for start in range(gpa, gpa + size, _SLICE):
            yield Request(start, _SLICE, _SHARED, Action.SWIOTLB)
        start, _ = self._zones.rings
        size = int(self._workload.boot.ring_size)
        for device in range(self._devices):
            for _ in range(self._workload.boot.rings):
                ring = Buffer(start, size, device)
                yield Request(ring.gpa, ring.size, _SHARED, Action.RING, ring)
                start += ring.size

    # -- afterwards --------------------------------------------------------------------------------

    def steady(self) -> Iterator[Request]:
        """Yield requests without end."""
        while True:
            (action,) = self._random.choices(self._actions, self._weights)
            if action is Action.ALLOC:
                request = self._alloc() or self._free()
            elif action is Action.FREE:
                request = self._free() or self._alloc()
            elif action is Action.ACCEPT:
                request = self._accept()
            elif action is Action.REBOOT:
                request = Request(0, 0, _PRIVATE, Action.REBOOT)
            else:
                request = self._hostile()
            if request is not None:
                yield request
            if self._rebooted:
                self._rebooted = False
                yield from self.boot()

    def _alloc(self) -> Request | None:
        sizes = [size for size, slots in self._free_slots.items() if slots]
        if not sizes or not self._devices:
            return None
        size = self._random.choice(sizes)
        if self._live_bytes + size > self._workload.buffers.live:
            return None
        buffer = Buffer(self._free_slots[size].pop(), size, self._random.randrange(self._devices))
        return Request(buffer.gpa, size, _SHARED, Action.ALLOC, buffer)

    def _free(self) -> Request | None:
        if not self._live:
            return None
        index = self._random.randrange(len(self._live))
        self._live[index], self._live[-1] = self._live[-1], self._live[index]
        buffer = self._live[-1]
        return Request(buffer.gpa, buffer.size, _PRIVATE, Action.FREE, buffer)

    def done(self, request: Request, *, converted: bool) -> None:
        """Tell the script how a request ended, so that it knows which buffers it has."""
        buffer = request.buffer
        if request.action is Action.REBOOT and converted:
            self._live.clear()
            self._live_bytes = 0
            self._free_slots = self._plan_slots()
            self._accepted = 0
            self._rebooted = True
        if buffer is None or request.action is Action.RING:
            return
        if request.action is Action.ALLOC:
            if converted:
                self._live.append(buffer)
                self._live_bytes += buffer.size
            else:
                self._free_slots[buffer.size].append(buffer.gpa)
        elif converted:
            self._live.pop()
            self._live_bytes -= buffer.size
            self._free_slots[buffer.size].append(buffer.gpa)

    def _accept(self) -> Request:
        """
        Lazily accepted memory: 2 MiB made private that is private.

        When all is accepted, single pages again.
        """
        gpa, size = self._zones.accept
        start = gpa + self._accepted
        if self._accepted + _SLICE <= size:
            self._accepted += _SLICE
            return Request(start, _SLICE, _PRIVATE, Action.ACCEPT)
        page = self._random.randrange(gpa, gpa + size, PAGE_SIZE)
        return Request(page, PAGE_SIZE, _PRIVATE, Action.ACCEPT)

    def _hostile(self) -> Request:
        gpa, size, to = self._random.choice(
            (
                self._overlapping,
                self._repeated,
                self._unaligned,
                self._two_blocks,
                self._hole,
                self._out_of_range,
            )
        )()
        return Request(gpa, size, to, Action.HOSTILE)

    def _state(self) -> PageState:
        return self._random.choice((_SHARED, _PRIVATE))

    def _overlapping(self) -> tuple[int, int, PageState]:
        """Any range in any state over the others: mixtures, and mappings cut in the middle."""
        gpa, size = self._zones.hostile
        start = self._random.randrange(0, size, PAGE_SIZE)
        length = self._random.choice((PAGE_SIZE, 12 * KIB, 64 * KIB, MIB))
        return gpa + start, min(length, size - start), self._state()

    def _repeated(self) -> tuple[int, int, PageState]:
        gpa, _ = self._zones.hostile
        return gpa, 16 * KIB, self._state()

    def _unaligned(self) -> tuple[int, int, PageState]:
        gpa, _ = self._zones.hostile
        return (
            gpa + self._random.randrange(1, PAGE_SIZE),
            self._random.randrange(1, MIB),
            self._state(),
        )

    def _two_blocks(self) -> tuple[int, int, PageState]:
        gpa, size = self._zones.hostile
        border = gpa + size // 2
        before = self._random.randrange(PAGE_SIZE, MIB, PAGE_SIZE)
        behind = self._random.randrange(PAGE_SIZE, MIB, PAGE_SIZE)
        return border - before, before + behind, self._state()

    def _hole(self) -> tuple[int, int, PageState]:
        end = self._places["low"].end
        return end - PAGE_SIZE, self._random.randrange(2 * PAGE_SIZE, MIB, PAGE_SIZE), self._state()

    def _out_of_range(self) -> tuple[int, int, PageState]:
        return (
            self._random.choice(((1 << 64) - PAGE_SIZE, 1 << 63, 1 << 64, -PAGE_SIZE)),
            2 * PAGE_SIZE,
            self._state(),
        )
