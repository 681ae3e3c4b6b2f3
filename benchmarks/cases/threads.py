# SPDX-License-Identifier: Apache-2.0
"""
Conversions per second from 1, 2, 4 and 8 threads, each on pages of its own, with one target.

One guest has one lock, and Python one for all threads: this is about what is lost by waiting for each other, not about
what is won.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from threading import Barrier, Thread
from time import perf_counter

from harness.context import Context
from harness.measure import Row, Summary
from harness.ours import IdleTarget, confidential_block
from ramblock import GuestMemory, PageState
from ramblock.units import GIB, KIB

__all__ = ["CASE", "run"]

CASE = "conversions of 4 KiB per second, by threads"

_THREADS = (1, 2, 4, 8)
_ONE, _OWN = "one guest", "a guest per thread"


def run(context: Context) -> Iterator[Row]:
    """Yield a row per number of threads."""
    context.say(CASE)
    pairs = context.choose(400, 10_000)
    for threads in _THREADS:
        rates: dict[str, list[float]] = {_ONE: [], _OWN: []}
        for _ in range(context.rounds):
            for name, samples in rates.items():
                guests = 1 if name == _ONE else threads
                samples.append(_rate(guests, threads, pairs // threads))
        yield Row(
            case=CASE,
            parameters={"threads": str(threads)},
            results={name: Summary.of(samples) for name, samples in rates.items()},
            unit="/s",
        )


def _rate(guests: int, threads: int, pairs: int) -> float:
    """Let *threads* convert *pairs* times to shared and back; conversions per second of all together."""
    with ExitStack() as stack:
        memories = [_guest(stack) for _ in range(guests)]
        return _race(memories, threads, pairs)


def _guest(stack: ExitStack) -> GuestMemory:
    memory = GuestMemory()
    memory.map(stack.enter_context(confidential_block(GIB)), 0)
    memory.attach(IdleTarget())
    return memory


def _race(memories: Sequence[GuestMemory], threads: int, pairs: int) -> float:
    start = Barrier(threads + 1)

    def work(memory: GuestMemory, gpa: int) -> None:
        start.wait()
        for _ in range(pairs):
            memory.convert(gpa, 4 * KIB, PageState.SHARED)
            memory.convert(gpa, 4 * KIB, PageState.PRIVATE)

    workers = [
        Thread(target=work, args=(memories[index % len(memories)], index * GIB // threads))
        for index in range(threads)
    ]
    for worker in workers:
        worker.start()
    start.wait()
    before = perf_counter()
    for worker in workers:
        worker.join()
    return threads * pairs * 2 / (perf_counter() - before)
