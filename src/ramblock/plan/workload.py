# SPDX-License-Identifier: Apache-2.0
"""
The conversions of a planned guest, in order: those of boot, then buffers that come and go.

Boot has the requests that the formula counts, in the slices in which it reaches the VMM. After
boot, under a seed: half of the conversions share a buffer of 4 KiB to 2 MiB (powers of two), the
others make private the rest of one, or a quarter of the time only a part of it, which fragments
memory. No more than 192 MiB, or an eighth of the guest, is in such buffers at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ramblock.discard.attributes import PageState
from ramblock.errors import UsageError
from ramblock.plan.formula import pages
from ramblock.plan.guest import Guest
from ramblock.plan.shares import Share, boot_shares, buffer_room, firmware
from ramblock.units import GIB, KIB, PAGE_SIZE

__all__ = ["End", "Request", "boot_requests", "steady_requests"]

_LOW_END = 2 * GIB
_HIGH_START = 4 * GIB
_SIZES = [4 * KIB << shift for shift in range(10)]


class End(StrEnum):
    """Which numbers of the ranges a simulation takes."""

    LOW = "low"
    EXPECTED = "expected"
    HIGH = "high"


class Request(NamedTuple):
    """One conversion."""

    gpa: int
    size: int
    to: PageState


class _Addresses:
    """Hands out guest addresses, ascending, over the hole below 4 GiB."""

    def __init__(self, guest: Guest) -> None:
        self._low_end = min(guest.memory, _LOW_END)
        self._end, _ = _steady_part(guest)
        self._next = 0

    def take(self, size: int) -> int:
        """Take room for one contiguous range."""
        start = self._next
        if start < self._low_end < start + size:
            start = _HIGH_START
        self._next = start + size
        if self._next > self._end:
            raise UsageError(
                f"what is shared at boot needs guest addresses up to {self._next:#x}",
                value=self._next,
                expected=f"at most {self._end:#x}: a larger guest, or fewer devices",
            )
        return start


def boot_requests(guest: Guest, end: End) -> Iterator[Request]:
    """Yield the conversions of boot: firmware's buffers, which go again, then the lasting ones."""
    slice_size = None if end is End.LOW else guest.technology.slice_size
    addresses = _Addresses(guest)
    transient = firmware()
    count = getattr(transient.requests, end)
    if count:
        size = getattr(transient.size, end) // count
        gpa = addresses.take(size)
        for _ in range(count):
            yield Request(gpa, size, PageState.SHARED)
            yield Request(gpa, size, PageState.PRIVATE)
    for share in boot_shares(guest):
        for gpa, size in _ranges(share, end, addresses):
            yield from _slices(gpa, size, slice_size)


def _ranges(share: Share, end: End, addresses: _Addresses) -> Iterator[tuple[int, int]]:
    """Divide a share into its requests, as evenly as pages can be."""
    total = pages(getattr(share.size, end))
    count = min(getattr(share.requests, end), total)
    if not count:
        return
    each, larger = divmod(total, count)
    for number in range(count):
        size = (each + (number < larger)) * PAGE_SIZE
        yield addresses.take(size), size


def _slices(gpa: int, size: int, slice_size: int | None) -> Iterator[Request]:
    step = slice_size or size
    for start in range(0, size, step):
        yield Request(gpa + start, min(step, size - start), PageState.SHARED)


def steady_requests(guest: Guest, seed: int) -> Iterator[Request]:
    """Yield as many conversions as the guest makes after boot."""
    source = random.Random(f"{seed}/plan")
    slots = _Slots(guest)
    live: list[_Buffer] = []
    live_bytes = 0
    for _ in range(guest.conversions):
        size = source.choice(_SIZES)
        free = source.random() < 0.5 or live_bytes + size > slots.room
        if not live or not free:
            buffer = _Buffer(slots.take(size), size, _Slot(size, size))
            live.append(buffer)
            live_bytes += size
            yield Request(buffer.gpa, size, PageState.SHARED)
            continue
        buffer = live.pop(source.randrange(len(live)))
        start, end = buffer.gpa, buffer.gpa + buffer.size
        total = pages(buffer.size)
        if total > 2 and source.random() < 0.25:
            first = source.randrange(1, total - 1)
            start = buffer.gpa + first * PAGE_SIZE
            end = buffer.gpa + source.randrange(first + 1, total) * PAGE_SIZE
            # The rest of it is freed later, as two buffers.
            live.append(_Buffer(buffer.gpa, start - buffer.gpa, buffer.slot))
            live.append(_Buffer(end, buffer.gpa + buffer.size - end, buffer.slot))
        buffer.slot.shared -= end - start
        if not buffer.slot.shared:
            slots.give_back(start, buffer.slot.size)
        live_bytes -= end - start
        yield Request(start, end - start, PageState.PRIVATE)


@dataclass
class _Slot:
    """Where a buffer was made."""

    size: int
    shared: int
    """Bytes of it that still are."""


class _Buffer(NamedTuple):
    gpa: int
    size: int
    slot: _Slot


def _steady_part(guest: Guest) -> tuple[int, int]:
    """Choose the buffers' place, as (start, end): the upper half of the larger part of memory."""
    low = min(guest.memory, _LOW_END)
    high = guest.memory - low
    start, end = (0, low) if high <= low else (_HIGH_START, _HIGH_START + high)
    middle = start + (end - start) // 2
    return -(-middle // _SIZES[-1]) * _SIZES[-1], end


class _Slots:
    """
    Room for buffers in the upper half of the guest's memory.

    Those of one size are multiples of it.
    """

    def __init__(self, guest: Guest) -> None:
        self._next, self._end = _steady_part(guest)
        self.room = buffer_room(guest)
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int:
        """Take room of a size, where a buffer of that size was if there was one."""
        free = self._free.get(size)
        if free:
            return free.pop()
        gpa = -(-self._next // size) * size
        self._next = gpa + size
        if self._next > self._end:
            raise UsageError(
                f"{size:#x} bytes at {gpa:#x} do not fit into the guest,"
                f" which ends at {self._end:#x}",
                value=gpa,
                expected="more memory, or fewer conversions",
            )
        return gpa

    def give_back(self, gpa: int, size: int) -> None:
        """Note that a buffer of *size* bytes is wholly private again, the last of it at *gpa*."""
        self._free.setdefault(size, []).append(gpa // size * size)
