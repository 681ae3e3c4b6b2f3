# SPDX-License-Identifier: Apache-2.0
"""What a device's access costs in the software IOMMU: translation and copy, beside the bare system call."""

from __future__ import annotations

import os
from collections.abc import Iterator

from harness.context import Context
from harness.measure import Row, Summary, timed
from harness.ours import OURS
from ramblock import RamBlock
from ramblock.dma import HostRange, SoftIommu
from ramblock.units import GIB, KIB, PAGE_SIZE, format_size

__all__ = ["CASE", "run"]

CASE = "device access through the software IOMMU"

SYSTEM_CALL = "the system call alone"

# Where the accesses go, one after the other: the biggest of them fits between two.
_PLACES = 997
_STEP = 64 * KIB


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
    times: dict[str, dict[str, list[float]]] = {
        verb: {OURS: [], SYSTEM_CALL: []} for verb in ("write", "read")
    }
    for index in range(context.choose(200, 2_000)):
        at = index * 7 % _PLACES * _STEP
        # Somewhere else, so that nobody finds in the cache what the other has brought there.
        other = (index + _PLACES // 2) * 7 % _PLACES * _STEP
        times["write"][OURS].append(timed(iommu.write, at, data))
        times["write"][SYSTEM_CALL].append(timed(os.pwrite, fd, data, other))
        times["read"][OURS].append(timed(iommu.read, at, size))
        times["read"][SYSTEM_CALL].append(timed(os.pread, fd, size, other))
    for verb, contenders in times.items():
        yield Row(
            case=CASE,
            parameters={
                "access": verb,
                "size": format_size(size),
                "mappings": f"{mappings:,}",
            },
            results={name: Summary.of(samples) for name, samples in contenders.items()},
        )
