# SPDX-License-Identifier: Apache-2.0
"""
The gauge: how fast the machine was while a row was measured.

CPU time does not count the time in which somebody else had the core. It does count a lower clock
frequency, a busy sibling of the core and a crowded cache. So a fixed loop in pure Python, of the
kind of work that a conversion is made of, is measured in the same rounds as the row; where the
gauges of two rows differ, so did the machine.
"""

from __future__ import annotations

from bisect import bisect_right
from threading import Lock
from typing import NamedTuple

from harness.measure import timed_each

__all__ = ["read_gauge"]


class _Piece(NamedTuple):
    start: int
    end: int


class _Table:
    """A lock, a sorted list, a dictionary and small objects: a conversion has nothing else."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts = list(range(0, 1 << 16, 1 << 8))
        self._heard: dict[int, _Piece] = {}

    def change(self, start: int, end: int) -> int:
        with self._lock:
            index = bisect_right(self._starts, start) - 1
            self._heard[index] = _Piece(start, end)
            try:
                return self._size(self._heard.pop(index))
            finally:
                self._heard.clear()

    def _size(self, piece: _Piece) -> int:
        return piece.end - piece.start


_TABLE = _Table()
_CALLS = 8
_LOOPS = [()] * 16


def _loop() -> None:
    for index in range(_CALLS):
        _TABLE.change(index << 12, (index + 1) << 12)


def read_gauge() -> float:
    """Measure the CPU time of the loop, in nanoseconds; sixteen by one reading of the clock."""
    return timed_each(_loop, _LOOPS)
