# SPDX-License-Identifier: Apache-2.0
"""
The whole conversion, ``GuestMemory.convert``: with no, one and four targets, and with memory that is really freed.

The targets of the first table map nothing. The second is about the backings: the side that is no longer used was written
to, so freeing it costs what it costs the kernel, which is measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.measure import Row, Summary, timed
from harness.ours import OURS, IdleTarget, confidential_block
from ramblock import GuestMemory, PageState
from ramblock.dma import SoftIommu
from ramblock.memory import StandInPrivate
from ramblock.units import GIB, KIB, MIB, format_size

__all__ = ["FREEING_CASE", "TARGETS_CASE", "run"]

TARGETS_CASE = "convert, by number of targets"
FREEING_CASE = "convert with one software IOMMU, memory really freed"

KERNEL = "the kernel alone"

_TARGETS = {"no target": 0, "1 target": 1, "4 targets": 4}


def run(context: Context) -> Iterator[Row]:
    """Yield the rows of both tables."""
    context.say(TARGETS_CASE)
    for size in (4 * KIB, 2 * MIB, GIB):
        yield from _targets(context, size)
    context.say(FREEING_CASE)
    sizes = {4 * KIB: (50, 200), 64 * KIB: (50, 200), 2 * MIB: (10, 50), 64 * MIB: (3, 10)}
    if not context.quick:
        sizes[GIB] = 3, 3
    for size, samples in sizes.items():
        yield from _freeing(size, context.choose(*samples))


def _targets(context: Context, size: int) -> Iterator[Row]:
    to_shared: dict[str, list[float]] = {}
    to_private: dict[str, list[float]] = {}
    for _ in range(context.rounds):
        for name, count in _TARGETS.items():
            with confidential_block(64 * GIB) as block:
                memory = GuestMemory()
                memory.map(block, 0)
                for _ in range(count):
                    memory.attach(IdleTarget())
                for _ in range(50):
                    for to, times in (
                        (PageState.SHARED, to_shared),
                        (PageState.PRIVATE, to_private),
                    ):
                        times.setdefault(name, []).append(timed(memory.convert, 0, size, to))
    yield from _both(TARGETS_CASE, size, to_shared, to_private)


def _freeing(size: int, samples: int) -> Iterator[Row]:
    to_shared: dict[str, list[float]] = {OURS: [], KERNEL: []}
    to_private: dict[str, list[float]] = {OURS: [], KERNEL: []}
    data = b"\xa5" * size
    with confidential_block(size) as block:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(SoftIommu())
        private = block.private
        assert isinstance(private, StandInPrivate)
        other = StandInPrivate("compared", size)
        for _ in range(samples):
            private.write(0, data)
            to_shared[OURS].append(timed(memory.convert, 0, size, PageState.SHARED))
            assert private.allocated_bytes() == 0
            block.write(0, data)
            to_private[OURS].append(timed(memory.convert, 0, size, PageState.PRIVATE))
            assert block.allocated_bytes() == 0
            for times in (to_shared, to_private):
                other.write(0, data)
                times[KERNEL].append(timed(other.discard, 0, size))
        other.close()
    yield from _both(FREEING_CASE, size, to_shared, to_private)


def _both(
    case: str, size: int, to_shared: dict[str, list[float]], to_private: dict[str, list[float]]
) -> Iterator[Row]:
    for to, times in (("shared", to_shared), ("private", to_private)):
        yield Row(
            case=case,
            parameters={"size": format_size(size), "to": to},
            results={name: Summary.of(samples) for name, samples in times.items()},
        )
