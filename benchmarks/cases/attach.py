# SPDX-License-Identifier: Apache-2.0
"""
How long a thread that converts has to wait while a device is attached to a guest in many pieces.

The board is every other page; the other thread converts a page behind it. The clock is the one on
the wall, because waiting uses no CPU time; the longest conversion before the attach stands beside
the longest during it, and tells how much of it the machine alone can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns, sleep

from harness.context import Context
from harness.ours import IdleTarget, confidential_block, share_checkerboard
from harness.rows import WALL, Row, Samples
from harness.waits import converting
from ramblock import GuestMemory
from ramblock.units import MIB, PAGE_SIZE

__all__ = ["CASE", "run"]

CASE = "attach to a checkerboard while another thread converts"

# How long the other thread converts undisturbed, in seconds.
_UNDISTURBED = 0.5


def run(context: Context) -> Iterator[Row]:
    """Yield one row."""
    context.say(CASE)
    runs = context.choose(100_000, 1_000_000)
    samples = Samples()
    before, during = [], []
    with confidential_block(2 * runs * PAGE_SIZE + MIB) as block:
        share_checkerboard(block, 2 * runs * PAGE_SIZE)
        memory = GuestMemory()
        memory.map(block, 0)
        for _ in range(context.choose(1, 3)):
            with converting(memory, [block.size - PAGE_SIZE]) as waits:
                sleep(_UNDISTURBED)
                start = perf_counter_ns()
                mapper = memory.attach(IdleTarget())
                end = perf_counter_ns()
            memory.detach(mapper)
            samples.add("attach", [end - start])
            before.append(waits.longest_until(start))
            during.append(waits.longest_during(start, end))
    yield samples.row(
        CASE,
        {"runs": f"{runs:,}"},
        facts={
            "longest conversion before, ms": max(before) / 1e6,
            "longest conversion meanwhile, ms": max(during) / 1e6,
        },
        clock=WALL,
    )
