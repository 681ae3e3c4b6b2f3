# SPDX-License-Identifier: Apache-2.0
"""
One byte for each page of an address space: the paper that the verifier draws on.

As naive as can be and still quick: a byte array for every 16 MiB in which something was marked,
filled, counted and searched by the interpreter's own C code. Addresses are in bytes; a range that
begins or ends inside a page means the whole page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSet
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

from ramblock.units import PAGE_SIZE

__all__ = ["MarkedPages", "Marks", "Stretches"]

#: Ranges of pages as (start, end), in bytes.
Stretches: TypeAlias = Iterator[tuple[int, int]]

_SHIFT = PAGE_SIZE.bit_length() - 1
_CHUNK_SHIFT = 12
_CHUNK = 1 << _CHUNK_SHIFT
_BLANK = bytes(_CHUNK)


class Marks:
    """A number from 0 to 255 for each page; 0 until another is put there."""

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def put(self, mark: int, start: int, end: int) -> None:
        """Mark the pages of [start, end)."""
        for number, low, high in _split(start, end):
            chunk = self._chunks.get(number)
            if chunk is None:
                if not mark:
                    continue
                chunk = self._chunks[number] = bytearray(_CHUNK)
            if high - low == 1:
                chunk[low] = mark
            else:
                chunk[low:high] = bytes((mark,)) * (high - low)

    def get(self, address: int) -> int:
        """Read the mark of one page."""
        number, page = divmod(address >> _SHIFT, _CHUNK)
        return self._chunks.get(number, _BLANK)[page]

    def count(self, mark: int, start: int, end: int) -> int:
        """Count the pages of [start, end) that have *mark*, which is not 0."""
        return sum(
            self._chunks.get(number, b"").count(mark, low, high)
            for number, low, high in _split(start, end)
        )

    def where(self, mark: int, start: int, end: int) -> Stretches:
        """Yield the maximal stretches of [start, end) with *mark*, which is not 0, ascending."""
        return self._runs(mark, _split(start, end))

    def everywhere(self, mark: int) -> Stretches:
        """Yield all maximal stretches that have *mark*, which is not 0, ascending."""
        return self._runs(mark, [(number, 0, _CHUNK) for number in sorted(self._chunks)])

    def elsewhere(self, mark: int, start: int, end: int) -> Stretches:
        """Yield the maximal stretches of [start, end) that do not have *mark*, which is not 0."""
        for low, high in self.where(mark, start, end):
            if start < low:
                yield start, low
            start = high
        if start < end:
            yield start, end

    def _runs(self, mark: int, pieces: Iterable[tuple[int, int, int]]) -> Stretches:
        # A run that reaches the end of its chunk may go on in the next.
        run_start = run_end = -1
        for number, low, high in pieces:
            chunk = self._chunks.get(number)
            if chunk is None:
                continue
            base = number << _CHUNK_SHIFT
            position = chunk.find(mark, low, high)
            while position >= 0:
                stop = _end_of_run(chunk, mark, position, high)
                if base + position != run_end:
                    if run_end >= 0:
                        yield run_start << _SHIFT, run_end << _SHIFT
                    run_start = base + position
                run_end = base + stop
                position = chunk.find(mark, stop, high)
        if run_end >= 0:
            yield run_start << _SHIFT, run_end << _SHIFT

    def clear(self) -> None:
        """Take all marks away."""
        self._chunks.clear()

    def __bool__(self) -> bool:
        """Whether a page was ever marked since the last :meth:`clear`."""
        return bool(self._chunks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Marks):
            return NotImplemented
        mine, theirs = self._chunks, other._chunks
        return all(
            mine.get(number, _BLANK) == theirs.get(number, _BLANK)
            for number in mine.keys() | theirs.keys()
        )

    __hash__ = None  # type: ignore[assignment]  # it changes


def _split(start: int, end: int) -> Iterable[tuple[int, int, int]]:
    """Split [start, end) by chunks: the number of each, and its pages [low, high)."""
    first, last = start >> _SHIFT, -(-end >> _SHIFT)
    number = first >> _CHUNK_SHIFT
    base = number << _CHUNK_SHIFT
    if last <= base + _CHUNK:  # as most do
        return ((number, first - base, last - base),)
    return [
        (base >> _CHUNK_SHIFT, max(first - base, 0), min(last - base, _CHUNK))
        for base in range(base, last, _CHUNK)
    ]


def _end_of_run(chunk: bytearray, mark: int, start: int, end: int) -> int:
    """Find where the run of *mark* that begins at *start* ends: there is no "find another byte"."""
    after = start + 1
    if after == end or chunk[after] != mark:
        return after
    return end - len(chunk[start:end].lstrip(bytes((mark,))))


class MarkedPages(MutableSet[int]):
    """The pages that have one mark, as a set of the addresses of their first bytes."""

    def __init__(self, marks: Marks, mark: int) -> None:
        self._marks = marks
        self._mark = mark

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and self._marks.get(page) == self._mark

    def __iter__(self) -> Iterator[int]:
        for start, end in self._marks.everywhere(self._mark):
            yield from range(start, end, PAGE_SIZE)

    def __len__(self) -> int:
        stretches = self._marks.everywhere(self._mark)
        return sum(end - start for start, end in stretches) // PAGE_SIZE

    def add(self, page: int) -> None:
        """Mark a page."""
        self._marks.put(self._mark, page, page + PAGE_SIZE)

    def discard(self, page: int) -> None:
        """Take the mark away from a page that has it."""
        if page in self:
            self._marks.put(0, page, page + PAGE_SIZE)

    def difference_update(self, pages: Iterable[int]) -> None:
        """Take the mark away from all of *pages*."""
        for page in pages:
            self.discard(page)

    def clear(self) -> None:
        """Take it away from all pages."""
        for start, end in list(self._marks.everywhere(self._mark)):
            self._marks.put(0, start, end)

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> AbstractSet[Any]:
        return set(it)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{page:#x}' for page in self)}}}"
