# SPDX-License-Identifier: Apache-2.0
"""
A value for each address, kept as runs.

Theory of operation. Two lists hold where each run begins, ascending, and its value, None for
nothing; neighbours with the *same object* are one run. The lists are cut into blocks of at most
512 runs, so that a change shifts a short tail and not that of a guest with 65,535 mappings, and
the cost of a range depends on the runs in it, not on its size: a trace may name all of 2**64.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import Enum
from itertools import compress
from typing import Generic, TypeVar

__all__ = ["Many", "RangeMap"]

V = TypeVar("V")


class Many(Enum):
    """Stands for the values of a range that has several, or one of them in a part."""

    MANY = 1


# A block is walked where a range ends in it, and summed up where it changed.
_MOST_RUNS = 512
_END = 1 << 64


class RangeMap(Generic[V]):
    """Values of ranges ``[start, end)`` of non-negative integers; compared by identity."""

    __slots__ = ("_blocks", "_covered", "_firsts", "_free")

    def __init__(self) -> None:
        #: First address of each block; the first block begins at 0, and no block is empty.
        self._firsts: list[int] = [0]
        self._blocks: list[tuple[list[int], list[V | None]]] = [([0], [None])]
        #: Bytes of each block that have a value; None: to be counted.
        self._covered: list[int | None] = [None]
        #: Bytes of each that have none; valid where the other is.
        self._free: list[int | None] = [None]

    def __bool__(self) -> bool:
        if len(self._blocks) == 1:
            first = self._blocks[0][1]
            return len(first) > 1 or first[0] is not None  # neighbours differ
        return any(value is not None for _, values in self._blocks for value in values)

    def set(self, start: int, end: int, value: V | None) -> None:
        """
        Give every address of the range, which must not be empty, this value.

        None removes it.
        """
        firsts = self._firsts
        index = bisect_right(firsts, start) - 1
        starts, values = self._blocks[index]
        self._covered[index] = None
        if index + 1 < len(firsts) and end > firsts[index + 1]:
            self._cut_front(bisect_right(firsts, end) - 1, end, index)
        low = bisect_left(starts, start)
        high = bisect_left(starts, end, low)
        is_new = low == 0 or values[low - 1] is not value
        if high < len(starts) and starts[high] == end:
            if values[high] is value:
                high += 1
            starts[low:high] = (start,) if is_new else ()
            values[low:high] = (value,) if is_new else ()
        elif index + 1 < len(firsts) and end == firsts[index + 1]:
            starts[low:] = (start,) if is_new else ()
            values[low:] = (value,) if is_new else ()
        else:
            after = values[high - 1]
            if after is value:
                starts[low:high] = (start,) if is_new else ()
                values[low:high] = (value,) if is_new else ()
            else:
                starts[low:high] = (start, end) if is_new else (end,)
                values[low:high] = (value, after) if is_new else (after,)
        if len(starts) == 1:
            self._join(index)
        elif len(starts) > _MOST_RUNS:
            self._split(index)

    def _cut_front(self, index: int, end: int, keep: int) -> None:
        """Let a block begin at *end*, which lies in it; drop those between it and block *keep*."""
        starts, values = self._blocks[index]
        at = bisect_right(starts, end) - 1
        del starts[:at]
        del values[:at]
        starts[0] = self._firsts[index] = end
        self._covered[index] = None
        for each in (self._blocks, self._firsts, self._covered, self._free):
            del each[keep + 1 : index]

    def _join(self, index: int) -> None:
        """Drop a block of one run that continues the last run of the block before it."""
        if index and self._blocks[index][1][0] is self._blocks[index - 1][1][-1]:
            for each in (self._blocks, self._firsts, self._covered, self._free):
                del each[index]
            self._covered[index - 1] = None

    def _split(self, index: int) -> None:
        starts, values = self._blocks[index]
        half = len(starts) // 2
        self._blocks.insert(index + 1, (starts[half:], values[half:]))
        self._firsts.insert(index + 1, starts[half])
        self._covered.insert(index + 1, None)
        self._free.insert(index + 1, None)
        del starts[half:]
        del values[half:]

    def get(self, address: int) -> V | None:
        """Return the value at one address."""
        starts, values = self._blocks[bisect_right(self._firsts, address) - 1]
        return values[bisect_right(starts, address) - 1]

    def single(self, start: int, end: int) -> V | Many | None:
        """Return the value of a range that has only one; None: it has none."""
        firsts = self._firsts
        index = bisect_right(firsts, start) - 1
        starts, values = self._blocks[index]
        at = bisect_right(starts, start)
        try:  # costs nothing where it holds, and most of the time it does
            border = starts[at]
        except IndexError:
            border = firsts[index + 1] if index + 1 < len(firsts) else end
        return values[at - 1] if end <= border else Many.MANY

    def pieces(self, start: int, end: int) -> list[tuple[int, int, V]]:
        """Return the runs with a value in the range, clipped, ascending: (start, end, value)."""
        firsts, blocks = self._firsts, self._blocks
        index = bisect_right(firsts, start) - 1
        starts, values = blocks[index]
        at = bisect_right(starts, start) - 1
        if (
            start < end and at + 1 < len(starts) and starts[at + 1] >= end
        ):  # all of it is one run, most of the time
            only = values[at]
            return [] if only is None else [(start, end, only)]
        found: list[tuple[int, int, V]] = []
        position = start
        while position < end:
            value = values[at]
            at += 1
            if at < len(starts):
                stop = starts[at]
            else:
                index += 1
                at = 0
                if index < len(blocks):
                    stop = firsts[index]
                    starts, values = blocks[index]
                else:
                    stop = end
            if stop > end:
                stop = end
            if value is not None:
                if found and found[-1][1] == position and found[-1][2] is value:
                    found[-1] = (found[-1][0], stop, value)
                else:
                    found.append((position, stop, value))
            position = stop
        return found

    def some(self, start: int, end: int, most: int) -> list[tuple[int, int, V]]:
        """
        Return the first runs in the range, as :meth:`pieces` does: *most* of them, or a few more.

        Those that are not asked for cost nothing.
        """
        only = self.single(start, end)
        if only is not Many.MANY:
            return [] if only is None or start >= end else [(start, end, only)]
        found: list[tuple[int, int, V]] = []
        for first, last in self._blocks_with(self._covered, start, end):
            found += self.pieces(first, last)
            if len(found) >= most:
                break
        return found

    def last(self, start: int, end: int) -> int:
        """Return the end of the last run in the range; *start*, if there is none."""
        for first, stop in reversed([*self._blocks_with(self._covered, start, end)]):
            if found := self.pieces(first, stop):
                return found[-1][1]
        return start

    def gaps(self, start: int, end: int, most: int | None = None) -> list[tuple[int, int]]:
        """
        Return the maximal ranges in the range that have no value, ascending.

        *most*: the first ones, as many or a few more. Runs between gaps that are not asked for cost
        nothing, and a block of runs without a gap is not looked into.
        """
        only = self.single(start, end)
        if only is not Many.MANY:
            return [(start, end)] if only is None and start < end else []
        found: list[tuple[int, int]] = []
        for first, last in self._blocks_with(self._free, start, end):
            position = first
            for run_start, run_end, _ in self.pieces(first, last):
                if run_start > position:
                    _extend(found, position, run_start)
                position = run_end
            if position < last:
                _extend(found, position, last)
            if most is not None and len(found) > most:
                break
        return found

    def covered(self, start: int, end: int) -> int:
        """Count the bytes in the range that have a value."""
        if start >= end:
            return 0
        only = self.single(start, end)
        if only is not Many.MANY:
            return 0 if only is None else end - start
        firsts = self._firsts
        low = bisect_right(firsts, start) - 1
        high = bisect_left(firsts, end)  # the block behind
        total = 0
        if firsts[low] != start:
            stop = firsts[low + 1] if low + 1 < high else end
            total += _sum(self.pieces(start, stop))
            low += 1
        if low < high and end != (firsts[high] if high < len(firsts) else _END):
            high -= 1
            total += _sum(self.pieces(firsts[high], end))
        if low < high:
            self._count(low, high)
            total += sum(self._covered[low:high])  # type: ignore[arg-type]
        return total

    def _blocks_with(
        self, counts: list[int | None], start: int, end: int
    ) -> Iterator[tuple[int, int]]:
        """Yield the parts of the range that lie in blocks whose count is not 0."""
        if start >= end:
            return
        firsts = self._firsts
        low = bisect_right(firsts, start) - 1
        high = bisect_left(firsts, end)
        if high - low == 1:
            yield start, end
            return
        self._count(low, high)
        for index in compress(range(low, high), counts[low:high]):
            first = firsts[index]
            stop = firsts[index + 1] if index + 1 < high else end
            yield max(first, start), stop

    def _count(self, low: int, high: int) -> None:
        """Count the bytes of the blocks that have changed."""
        while None in self._covered[low:high]:
            low = index = self._covered.index(None, low)
            starts, values = self._blocks[index]
            first = starts[0]
            border = self._firsts[index + 1] if index + 1 < len(self._firsts) else _END
            covered = 0
            for start, end, value in zip(starts, [*starts[1:], border], values, strict=True):
                if value is not None:
                    covered += end - start
            self._covered[index] = covered
            self._free[index] = border - first - covered

    def items(self) -> Iterator[tuple[int, int, V]]:
        """Yield all runs, ascending. One that goes beyond 2**64 ends there."""
        yield from self.pieces(0, _END)

    def clear(self) -> None:
        """Forget everything."""
        self._firsts = [0]
        self._blocks = [([0], [None])]
        self._covered = [None]
        self._free = [None]


def _extend(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Append a range; one that continues the last makes it longer."""
    if ranges and ranges[-1][1] == start:
        start = ranges.pop()[0]
    ranges.append((start, end))


def _sum(pieces: list[tuple[int, int, V]]) -> int:
    return sum(end - start for start, end, _ in pieces)
