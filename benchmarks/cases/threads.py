# SPDX-License-Identifier: Apache-2.0
"""
Threads that convert at the same time: conversions per second, and how long one waits.

One guest has one lock, and Python one for all threads: the first table is about what is lost by
waiting for each other, not about what is won. In the second, each thread converts a page of its own
in the same guest. The clock is the one on the wall in both: a thread that waits uses no CPU time,
and waiting is the question. So a busy machine shows here; one thread alone is beside the others for
that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from threading import Barrier, Thread
from time import perf_counter, perf_counter_ns, sleep

from harness.context import Context
from harness.ours import confidential_guest
from harness.rows import WALL, Row, Samples
from harness.waits import converting
from ramblock import GuestMemory, PageState
from ramblock.units import GIB, KIB

__all__ = ["CASE", "EIGHT", "LONGEST", "ONE", "WAITS_CASE", "WINDOW", "run"]

CASE = "conversions of 4 KiB per second, by threads"
WAITS_CASE = "how long a conversion of 4 KiB takes, by threads in one guest"
ONE, EIGHT = "1", "8"
#: The column with the longest conversion of the window in the middle.
WINDOW = "longest of a window, µs"
#: The column with the ratio that is promised.
LONGEST = "that / median"

# The longest of all is easily a moment in which the machine ran somebody else. So the time is cut
# in windows; the promise is about the longest conversion of the window in the middle, in their
# order: whoever starves, starves in most of them.
_WINDOW_NS = 250_000_000

_THREADS = (1, 2, 4, 8)
_ONE, _OWN = "one guest", "a guest per thread"


def run(context: Context) -> Iterator[Row]:
    """Yield a row per number of threads, in both tables."""
    context.say(CASE)
    pairs = context.choose(400, 10_000)
    for threads in _THREADS:
        samples = Samples()
        for _ in range(context.rounds):
            for name in (_ONE, _OWN):
                guests = 1 if name == _ONE else threads
                samples.add(name, [_rate(guests, threads, pairs // threads)])
        yield samples.row(CASE, {"threads": str(threads)}, unit="/s", clock=WALL)
    context.say(WAITS_CASE)
    for threads in (int(ONE), int(EIGHT)):
        yield _waits(threads, context.choose(8, 40))


def _rate(guests: int, threads: int, pairs: int) -> float:
    """Let *threads* convert *pairs* times to shared and back; conversions per second of all."""
    with ExitStack() as stack:
        memories = [stack.enter_context(confidential_guest(GIB)) for _ in range(guests)]
        return _race(memories, threads, pairs)


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


def _waits(threads: int, windows: int) -> Row:
    gpas = [index * GIB // threads for index in range(threads)]
    with confidential_guest(GIB) as memory, converting(memory, gpas) as waits:
        start = perf_counter_ns()
        sleep(windows * _WINDOW_NS / 1e9)
    latencies = waits.latencies()
    by_window = median(waits.longest_by_window(start, _WINDOW_NS, windows))
    samples = Samples()
    samples.add("one conversion", latencies)
    longest, middle = max(latencies), median(latencies)
    return samples.row(
        WAITS_CASE,
        {"threads": str(threads), "conversions": f"{len(latencies):,}"},
        facts={
            "median, µs": middle / 1e3,
            "longest, µs": longest / 1e3,
            "longest / median": longest / middle,
            WINDOW: by_window / 1e3,
            LONGEST: by_window / middle,
        },
        clock=WALL,
    )
