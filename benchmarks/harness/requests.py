# SPDX-License-Identifier: Apache-2.0
"""
Recorded requests: the same list goes to ours and to the programs in C, which read it from a file.

What is timed leaves the guest in the state that the setup made, so a list can be replayed any
number of times. Timed requests of one direction that follow each other are a group: one reading of
the clock for all of them, in Python and in C, because one conversion in C takes less than the
reading.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ramblock.units import GIB, MIB, PAGE_SIZE

__all__ = [
    "Group",
    "Pattern",
    "Request",
    "RequestList",
    "checkerboard",
    "conversions",
    "random_mix",
    "shared_runs",
]

# ../baseline/driver.c reads these.
_HEADER = struct.Struct("<QQQ")
_REQUEST = struct.Struct("<QQQ")
_WINDOW = struct.Struct("<QQ")
_TO_SHARED, _TIMED = 1, 2

# The state is compared inside every request and this far around it: what is written next to it by
# mistake shows.
_MARGIN = 64


class Request(NamedTuple):
    """One conversion. In pages, half-open."""

    start: int
    end: int
    shared: bool
    timed: bool = True

    @property
    def span(self) -> tuple[int, int]:
        """Offset and size, in bytes."""
        return self.start * PAGE_SIZE, (self.end - self.start) * PAGE_SIZE


class Group(NamedTuple):
    """Requests that are timed together, or not timed."""

    shared: bool
    timed: bool
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class RequestList:
    """Requests for a guest of *pages* pages."""

    pages: int
    requests: tuple[Request, ...]

    @cached_property
    def groups(self) -> list[Group]:
        """Cut the requests into groups; ../baseline/driver.c cuts them in the same way."""
        cut = groupby(self.requests, key=lambda request: (request.shared, request.timed))
        return [Group(*key, tuple(requests)) for key, requests in cut]

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """List where the state is compared: around each request. Ascending and disjoint."""
        windows: list[tuple[int, int]] = []
        for start, end in sorted({(request.start, request.end) for request in self.requests}):
            low, high = max(start - _MARGIN, 0), min(end + _MARGIN, self.pages)
            if windows and low <= windows[-1][1]:
                windows[-1] = windows[-1][0], max(windows[-1][1], high)
            else:
                windows.append((low, high))
        return windows

    def write(self, path: Path) -> Path:
        """Write the file that the programs in C read; return *path*."""
        with path.open("wb") as file:
            file.write(_HEADER.pack(self.pages, len(self.requests), len(self.windows)))
            for start, end, shared, timed in self.requests:
                file.write(_REQUEST.pack(start, end, shared * _TO_SHARED | timed * _TIMED))
            for window in self.windows:
                file.write(_WINDOW.pack(*window))
        return path

    def split(self, times: list[float]) -> tuple[list[float], list[float]]:
        """Sort the *times* of groups, of any number of passes: to shared, to private."""
        directions = [group.shared for group in self.groups if group.timed]
        sides: tuple[list[float], list[float]] = [], []
        for index, time in enumerate(times):
            sides[not directions[index % len(directions)]].append(time)
        return sides


class Pattern(Enum):
    """What else is shared in the guest."""

    NOTHING = "nothing"
    SWIOTLB = "SWIOTLB low"
    """The bounce buffer of a Linux guest, below 3 GiB and close behind what is converted."""
    FAR_END = "far end"
    """The last page."""

    def shared(self, pages: int) -> tuple[int, int] | None:
        """Name the range that is shared in a guest of *pages* pages."""
        size = pages * PAGE_SIZE
        if self is Pattern.NOTHING:
            return None
        if self is Pattern.FAR_END:
            return pages - 1, pages
        # 6 % of RAM between 64 MiB and 1 GiB: arch/x86/mm/mem_encrypt.c, mem_encrypt_setup_arch().
        pool = min(max(size * 6 // 100, 64 * MIB), GIB) // (2 * MIB) * (2 * MIB)
        end = min(3 * GIB, size - 64 * MIB)
        return (end - pool) // PAGE_SIZE, end // PAGE_SIZE


# How many places are converted by one reading of the clock; a small conversion always meets some
# state that is new to it.
_PLACES = 8


def conversions(pages: int, size: int, pattern: Pattern, pairs: int) -> RequestList | None:
    """
    Convert ranges of *size* bytes at the start of a guest to shared and back, *pairs* of times.

    Upwards to shared and downwards back to private: so nothing that is shared lies between a range
    that is converted and the end of the guest, besides what the pattern puts there, and the
    bitmap's search goes as far as it would for one range alone. The first group there and back is
    not timed: it makes memory resident that the next ones only read.

    :return: None where the ranges do not fit beside what else is shared.
    """
    unit = size // PAGE_SIZE
    places = _PLACES if size < GIB else 1
    other = pattern.shared(pages)
    if unit * places > (pages if other is None else other[0]):
        return None
    requests = [] if other is None else [Request(*other, shared=True, timed=False)]
    starts = range(0, places * unit, unit)
    for index in range(max(pairs // places, 1) + 1):
        timed = index > 0
        requests += [Request(start, start + unit, shared=True, timed=timed) for start in starts]
        requests += [
            Request(start, start + unit, shared=False, timed=timed) for start in reversed(starts)
        ]
    return RequestList(pages, tuple(requests))


def checkerboard(pages: int) -> RequestList:
    """Share every other page, then convert all to private, timed; the same to shared."""
    board = [Request(page, page + 1, shared=True, timed=False) for page in range(0, pages, 2)]
    return RequestList(
        pages,
        (
            *board,
            Request(0, pages, shared=False),
            *board,
            Request(0, pages, shared=True),
            Request(0, pages, shared=False, timed=False),
        ),
    )


def shared_runs(pages: int, runs: Iterable[tuple[int, int]]) -> RequestList:
    """Share *runs*, untimed."""
    return RequestList(pages, tuple(Request(*run, shared=True, timed=False) for run in runs))


def random_mix(pages: int, count: int, seed: int) -> RequestList:
    """Convert *count* random ranges, many of them mixtures: to compare states, not to time."""
    return RequestList(pages, tuple(_random(pages, count, seed)))


def _random(pages: int, count: int, seed: int) -> Iterator[Request]:
    choose = random.Random(seed)
    for _ in range(count):
        start = choose.randrange(pages)
        size = min(1 << choose.randrange(pages.bit_length()), pages - start)
        yield Request(start, start + size, shared=choose.random() < 0.5)
