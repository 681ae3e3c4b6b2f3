# SPDX-License-Identifier: Apache-2.0
"""Threads that convert without a pause and note when each conversion began and ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Barrier, Event, Thread
from time import perf_counter_ns

from ramblock import GuestMemory, PageState
from ramblock.units import PAGE_SIZE

__all__ = ["Waits", "converting"]


class Waits:
    """When the conversions of some threads began and ended."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []

    def extend(self, spans: Sequence[tuple[int, int]]) -> None:
        """Note what a thread has seen."""
        self._spans.extend(spans)

    def latencies(self) -> list[int]:
        """List how long each took, in nanoseconds."""
        return [after - before for before, after in self._spans]

    def longest_by_window(self, start: int, window: int, count: int) -> list[int]:
        """
        Tell the longest that was under way in each of *count* windows.

        The first begins at *start*, of ``perf_counter_ns``; each has *window* nanoseconds.

        One that spans several windows counts in each.
        """
        longest = [0] * count
        for before, after in self._spans:
            first, last = (before - start) // window, (after - start) // window
            for index in range(max(first, 0), min(last, count - 1) + 1):
                longest[index] = max(longest[index], after - before)
        return longest

    def longest_until(self, moment: int) -> int:
        """Tell the longest that was over at *moment* of ``perf_counter_ns``; 0: there is none."""
        return max((after - before for before, after in self._spans if after <= moment), default=0)

    def longest_during(self, start: int, end: int) -> int:
        """Tell the longest that was under way in ``[start, end)``; 0: there is none."""
        return max(
            (after - before for before, after in self._spans if before < end and start < after),
            default=0,
        )


@contextmanager
def converting(memory: GuestMemory, gpas: Sequence[int]) -> Iterator[Waits]:
    """Let a thread for each of *gpas* convert the page there until the block is left."""
    waits = Waits()
    stop = Event()
    start = Barrier(len(gpas) + 1)

    def work(gpa: int) -> None:
        spans = []
        clock, stopped, convert = perf_counter_ns, stop.is_set, memory.convert
        start.wait()
        while not stopped():
            for to in (PageState.SHARED, PageState.PRIVATE):
                before = clock()
                convert(gpa, PAGE_SIZE, to)
                spans.append((before, clock()))
        waits.extend(spans)

    threads = [Thread(target=work, args=(gpa,)) for gpa in gpas]
    for thread in threads:
        thread.start()
    start.wait()
    try:
        yield waits
    finally:
        stop.set()
        for thread in threads:
            thread.join()
