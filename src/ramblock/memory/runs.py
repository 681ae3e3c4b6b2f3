# SPDX-License-Identifier: Apache-2.0
"""
The algebra of runs: ascending, disjoint, half-open ``(start, end)`` pairs in bytes, lazily.

Everything here costs what the runs are many, not what the range is long; only a source without ``ranges`` is asked granule
by granule, because it offers nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from ramblock.memory.protocols import Source

__all__ = ["Runs", "complement", "intersect", "merge_adjacent", "populated_in"]

Runs: TypeAlias = Iterator[tuple[int, int]]


def complement(runs: Runs, start: int, end: int) -> Runs:
    """Yield the parts of [start, end) that no run covers; the runs must lie inside it."""
    position = start
    for run_start, run_end in runs:
        if run_start > position:
            yield position, run_start
        position = max(position, run_end)
    if position < end:
        yield position, end


def intersect(runs: Runs, source: Source) -> Runs:
    """Yield the parts of *runs* that *source* calls populated."""
    for start, end in runs:
        yield from populated_in(source, start, end)


def populated_in(source: Source, start: int, end: int) -> Runs:
    """Yield the populated runs of one source inside [start, end), as (start, end)."""
    ranges = getattr(source, "ranges", None)
    if ranges is not None:
        for offset, size in ranges(start, end - start):
            yield offset, offset + size
        return
    run_start: int | None = None
    position = start
    while position < end:
        # Up to the source's next boundary: its state cannot change inside a granule.
        stop = min(end, (position // source.granularity + 1) * source.granularity)
        if source.is_populated(position, stop - position):
            if run_start is None:
                run_start = position
        elif run_start is not None:
            yield run_start, position
            run_start = None
        position = stop
    if run_start is not None:
        yield run_start, end


def merge_adjacent(runs: Runs) -> Runs:
    """Join runs that touch."""
    start = end = -1
    for run_start, run_end in runs:
        if run_start == end:
            end = run_end
            continue
        if end > start:
            yield start, end
        start, end = run_start, run_end
    if end > start:
        yield start, end
