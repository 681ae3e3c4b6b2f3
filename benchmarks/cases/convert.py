# SPDX-License-Identifier: Apache-2.0
"""
``GuestMemory.convert``: with no to four targets, and with memory that is really freed.

The targets of the first table map nothing. The second is about the backings: the side that is no
longer used was written to, so freeing it costs what it costs the kernel, which is measured beside
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol, cast

from harness.context import Context
from harness.loop import DIRECTIONS, ConvertLoop, spread_places
from harness.measure import timed
from harness.ours import OURS, confidential_block, confidential_guest
from harness.rows import Row, Samples
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.units import GIB, KIB, MIB, format_size

__all__ = ["FREEING_CASE", "TARGETS_CASE", "run"]

TARGETS_CASE = "convert, by number of targets"
FREEING_CASE = "convert with one software IOMMU, memory really freed"

KERNEL = "the kernel alone"

_TARGETS = {"no target": 0, "1 target": 1, "2 targets": 2, "4 targets": 4}


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
    samples = [Samples() for _ in DIRECTIONS]
    with ExitStack() as stack:
        loops = {}
        for name, count in _TARGETS.items():
            memory = stack.enter_context(confidential_guest(64 * GIB, count))
            loops[name] = ConvertLoop(memory, spread_places(size), size)
            loops[name].turn(1)
        for _ in range(context.choose(60, 300)):
            for name, loop in loops.items():
                loop.turn_into(samples, name, 2)
    yield from _both(TARGETS_CASE, size, samples)


def _freeing(size: int, count: int) -> Iterator[Row]:
    samples = [Samples() for _ in DIRECTIONS]
    data = b"\xa5" * size
    with confidential_block(size) as block, confidential_block(size) as compared:
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(SoftIommu())
        private, other = _stand_in(block), _stand_in(compared)
        for _ in range(count):
            private.write(0, data)
            samples[0].add(OURS, [timed(memory.convert, 0, size, PageState.SHARED)])
            assert private.allocated_bytes() == 0
            block.write(0, data)
            samples[1].add(OURS, [timed(memory.convert, 0, size, PageState.PRIVATE)])
            assert block.allocated_bytes() == 0
            for entry in samples:
                other.write(0, data)
                entry.add(KERNEL, [timed(other.discard, 0, size)])
    yield from _both(FREEING_CASE, size, samples)


class _StandIn(Protocol):
    """The private side of a block, on a host without KVM: its bytes can be written from here."""

    def write(self, offset: int, data: bytes) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def allocated_bytes(self) -> int: ...


def _stand_in(block: RamBlock) -> _StandIn:
    return cast(_StandIn, block.private)


def _both(case: str, size: int, samples: list[Samples]) -> Iterator[Row]:
    for to, entry in zip(DIRECTIONS, samples, strict=True):
        yield entry.row(case, {"size": format_size(size), "to": to.value})
