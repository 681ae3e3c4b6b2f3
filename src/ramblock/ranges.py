# SPDX-License-Identifier: Apache-2.0
"""Runs: ascending, disjoint, half-open pairs ``(start, end)``, lazily; the cost is one of runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

Runs: TypeAlias = Iterator[tuple[int, int]]


def clip(runs: Runs, start: int, end: int) -> Runs:
    """Yield the parts of *runs* that lie in [start, end)."""
    for run_start, run_end in runs:
        low, high = max(run_start, start), min(run_end, end)
        if low < high:
            yield low, high


def complement(runs: Runs, start: int, end: int) -> Runs:
    """Yield the parts of [start, end) that no run covers; the runs must lie inside it."""
    position = start
    for run_start, run_end in runs:
        if run_start > position:
            yield position, run_start
        if run_end > position:  # max() is a call for each run: a fifth of the whole
            position = run_end
    if position < end:
        yield position, end


def merge(runs: Iterable[tuple[int, int]]) -> Runs:
    """Join runs that touch or overlap; they ascend by their start."""
    start = end = -1
    for run_start, run_end in runs:
        if run_start > end:
            if end > start:
                yield start, end
            start = run_start
        if run_end > end:
            end = run_end
    if end > start:
        yield start, end
