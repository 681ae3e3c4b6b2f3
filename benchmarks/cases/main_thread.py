# SPDX-License-Identifier: Apache-2.0
"""
What it costs that interrupts wait: the same conversions on the main thread and on another one.

Python delivers signals to the main thread only, so only there has an operation to hold them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from harness.context import Context
from harness.loop import DIRECTIONS, ConvertLoop, spread_places
from harness.ours import confidential_guest
from harness.rows import Row, Samples
from ramblock.units import GIB, KIB

__all__ = ["CASE", "MAIN", "OTHER", "run"]

CASE = "convert 4 KiB with one target, by thread"
MAIN, OTHER = "main thread", "another thread"


def run(context: Context) -> Iterator[Row]:
    """Yield a row for each direction."""
    context.say(CASE)
    samples = [Samples() for _ in DIRECTIONS]
    with confidential_guest(GIB) as memory, ThreadPoolExecutor(max_workers=1) as pool:
        loop = ConvertLoop(memory, spread_places(4 * KIB))
        loop.turn(1)
        for _ in range(context.choose(300, 1000)):
            # The gauge is read where the work was done: each thread has a clock of its own.
            pool.submit(loop.turn_into, samples, OTHER, 3).result()
            loop.turn_into(samples, MAIN, 3)
    for to, entry in zip(DIRECTIONS, samples, strict=True):
        yield entry.row(CASE, {"to": to.value})
