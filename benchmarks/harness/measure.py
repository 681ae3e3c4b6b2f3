# SPDX-License-Identifier: Apache-2.0
"""
Measuring: CPU time of the calling thread, in groups of calls, and what is said about it afterwards.

CPU time, because a machine that does something else meanwhile takes wall-clock time from whoever is
measured, at random. Its clock is a system call and costs as much as a small conversion: so calls
that are too short for a clock of their own are timed in groups, each group of one direction, and
the cost of reading the clock is subtracted once for each group. The figure is the best decile: what
the work costs when neither a cache nor a neighbour's memory traffic was against it. The median and
the worst decile stand beside it; nothing is thrown away, and Python's garbage collector runs as it
does for a user.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns, thread_time_ns

__all__ = ["CLOCK", "Summary", "resident_bytes", "timed", "timed_each", "timed_wall"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What many samples say. Nanoseconds, or a rate where the row says so."""

    count: int
    best: float
    """The best decile, the figure: the 10th percentile of times, the 90th of rates."""
    median: float
    worst: float
    """The worst decile, at the other end."""

    @classmethod
    def of(cls, samples: Iterable[float], *, rates: bool = False) -> Summary:
        """
        Sum up *samples*, of which there is at least one.

        :param rates: More is better.
        """
        ranked = sorted(samples, reverse=rates)
        last = len(ranked) - 1
        return cls(
            len(ranked), ranked[round(last * 0.1)], median(ranked), ranked[round(last * 0.9)]
        )


def _clock_cost(samples: int = 1001) -> float:
    """Tell what reading the clock twice adds to a measurement, in nanoseconds."""
    clock = thread_time_ns
    costs = []
    for _ in range(samples):
        before = clock()
        costs.append(clock() - before)
    # The decile that is reported of everything else: a median would take too much from it.
    return Summary.of(costs).best


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Measure the CPU time of one call, in nanoseconds. For calls of ten microseconds and more."""
    clock = thread_time_ns
    before = clock()
    call(*arguments)
    return max(clock() - before - CLOCK, 0)


def timed_each(call: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> float:
    """Measure the CPU time of a group, a call per entry of *arguments*; nanoseconds per call."""
    clock = thread_time_ns
    before = clock()
    for entry in arguments:
        call(*entry)
    return max(clock() - before - CLOCK, 0) / len(arguments)


def timed_wall(call: Callable[..., object], *arguments: object) -> float:
    """Measure one call by the clock on the wall, in nanoseconds. For whoever waits."""
    before = perf_counter_ns()
    call(*arguments)
    return perf_counter_ns() - before


def resident_bytes() -> int:
    """Tell how much memory this process has resident, exactly; garbage is collected first."""
    gc.collect()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Rss")


#: What reading the clock twice costs here, in nanoseconds.
CLOCK = _clock_cost()
