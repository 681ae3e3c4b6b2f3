# SPDX-License-Identifier: Apache-2.0
"""
Measuring: single calls, each by the clock, and what is said about them afterwards.

Every call is timed on its own, because the two directions of a conversion alternate and cost different things: a loop
around both would show neither. What reading the clock costs is measured the same way and subtracted. Numbers are
medians with the 10th and 90th percentile; nothing is thrown away, and Python's garbage collector runs as it does for a
user.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter_ns

__all__ = ["CLOCK", "Row", "Summary", "resident_bytes", "timed"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What many samples say. Nanoseconds, unless the row has another unit."""

    count: int
    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Sum up *samples*, of which there is at least one."""
        ranked = sorted(samples)
        last = len(ranked) - 1
        return cls(
            len(ranked), median(ranked), ranked[round(last * 0.1)], ranked[round(last * 0.9)]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: what was done, and what each contender needed for it."""

    case: str
    """The table."""
    parameters: dict[str, str]
    """By column, for instance ``{"size": "4 KiB", "to": "shared"}``."""
    results: dict[str, Summary]
    """By contender, ours first."""
    facts: dict[str, int] = field(default_factory=dict)
    """What was counted rather than timed: calls, bytes."""
    unit: str = "ns"
    """``ns``, or ``/s`` for a rate."""
    note: str = ""
    """Why the first contender is slower than another, should it be."""


def _clock_cost(samples: int = 1001) -> float:
    """Tell what reading the clock twice adds to a measurement, in nanoseconds."""
    clock = perf_counter_ns
    costs = []
    for _ in range(samples):
        before = clock()
        costs.append(clock() - before)
    return median(costs)


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Time one call, in nanoseconds."""
    clock = perf_counter_ns
    before = clock()
    call(*arguments)
    return max(clock() - before - CLOCK, 0)


def resident_bytes() -> int:
    """Tell how much memory this process has resident, exactly; garbage is collected first."""
    gc.collect()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Rss")


#: What reading the clock twice costs here, in nanoseconds.
CLOCK = _clock_cost()
