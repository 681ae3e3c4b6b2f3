# SPDX-License-Identifier: Apache-2.0
"""A device's access through the software IOMMU: translation and copy, and the bare system call."""

from __future__ import annotations

import os
from collections.abc import Iterator

from harness.context import Context
from harness.measure import timed_each
from harness.ours import OURS
from harness.rows import Row, Samples
from ramblock import RamBlock
from ramblock.dma import HostRange, SoftIommu
from ramblock.units import GIB, KIB, PAGE_SIZE, format_size

__all__ = ["CASE", "run"]

CASE = "device access through the software IOMMU"

SYSTEM_CALL = "the system call alone"

# Where the accesses go, one after the other: the biggest of them fits between two.
_PLACES = 997
_STEP = 64 * KIB

# Accesses by one reading of the clock: a system call takes no longer than the reading.
_GROUP = 8


def run(context: Context) -> Iterator[Row]:
    """Yield a row per direction, size and number of mappings."""
    context.say(CASE)
    with RamBlock.create("ram", GIB) as block:
        # Else whoever writes first to a page pays for its allocation.
        for place in range(_PLACES):
            block.write(place * _STEP, bytes(_STEP))
        for mappings in (1, 65_536):
            iommu = SoftIommu()
            step = GIB // mappings if mappings == 1 else PAGE_SIZE
            for start in range(0, mappings * step, step):
                iommu.map(start, HostRange(block.fd, start, block.address + start, step))
            for size in (64, 4 * KIB, 64 * KIB):
                yield from _rows(context, iommu, block, mappings, size)


def _rows(
    context: Context, iommu: SoftIommu, block: RamBlock, mappings: int, size: int
) -> Iterator[Row]:
    fd, data = block.fd, bytes(size)
    assert fd is not None
    samples = {"write": Samples(), "read": Samples()}
    for turn in range(context.choose(30, 250)):
        places = _places(turn * _GROUP)
        # Somewhere else, so that nobody finds in the cache what the other has brought there.
        others = _places(turn * _GROUP + _PLACES // 2)
        written, read = samples["write"], samples["read"]
        written.add(OURS, [timed_each(iommu.write, [(at, data) for at in places])])
        written.add(SYSTEM_CALL, [timed_each(os.pwrite, [(fd, data, at) for at in others])])
        read.add(OURS, [timed_each(iommu.read, [(at, size) for at in places])])
        read.add(SYSTEM_CALL, [timed_each(os.pread, [(fd, size, at) for at in others])])
    for verb, entry in samples.items():
        yield entry.row(
            CASE,
            {"access": verb, "size": format_size(size), "mappings": f"{mappings:,}"},
        )


def _places(first: int) -> list[int]:
    return [index * 7 % _PLACES * _STEP for index in range(first, first + _GROUP)]
