# SPDX-License-Identifier: Apache-2.0
"""
A bitmap that takes memory only where something is set.

Theory of operation. The bits are cut into chunks of 2**16 (one chunk of 4 KiB pages describes 256 MiB). A chunk that is
absent is all zeros. A chunk that one operation fills is the one shared, immutable :data:`_ONES`: filling or emptying a
terabyte costs a dictionary entry per 256 MiB, and nothing is ever searched outside the range asked for.
Every cost depends on the range, on what is set inside it, and not on the length of the bitmap.

Positions are bits, half-open. Callers pass ranges that lie inside the bitmap; the layers above check what comes from
outside. Readers need no lock for their own safety: one that runs beside a writer sees each bit before or after.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray, frozenbitarray

__all__ = ["SavedBits", "SparseBitmap"]

_CHUNK_SHIFT = 16
# A chunk takes 8 KiB: what a guest can make us allocate by touching a single bit. 2**15 takes half of that, and a
# conversion of 1 GiB is a quarter slower.
_CHUNK_BITS = 1 << _CHUNK_SHIFT
_CHUNK_MASK = _CHUNK_BITS - 1
_ONES = frozenbitarray(b"\xff") * (_CHUNK_BITS // 8)

#: What :meth:`SparseBitmap.save` returns and :meth:`SparseBitmap.restore` takes: chunk, first bit in it, the bits.
SavedBits = list[tuple[int, int, bitarray]]


class SparseBitmap:
    """
    A fixed number of bits, all clear at first.

    :param length: Number of bits.
    """

    __slots__ = ("_chunks", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._chunks: dict[int, bitarray] = {}

    def _present(self, first: int, end: int) -> list[int]:
        """List the chunks from *first* to before *end* that exist, ascending."""
        chunks = self._chunks
        if end - first <= len(chunks):
            return [index for index in range(first, end) if index in chunks]
        # list(dict) is one step for other threads; iterating over the dictionary itself is not.
        return sorted(index for index in list(chunks) if first <= index < end)

    def _touched(self, start: int, end: int) -> list[int]:
        """List the chunks that exist and touch a range of bits, ascending."""
        first, last = start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT
        if first == last:
            return [first] if first in self._chunks else []
        return self._present(first, last + 1)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, bitarray, int, int]]:
        """Chunks that exist, with the part of each that lies in the range: (index, chunk, first, last + 1)."""
        for index in self._touched(start, end):
            chunk = self._chunks.get(index)
            if chunk is not None:
                base = index << _CHUNK_SHIFT
                yield index, chunk, max(start - base, 0), min(end - base, _CHUNK_BITS)

    def get(self, position: int) -> bool:
        """Whether one bit is set."""
        chunk = self._chunks.get(position >> _CHUNK_SHIFT)
        return chunk is not None and bool(chunk[position & _CHUNK_MASK])

    def set(self, start: int, end: int) -> int:
        """Set every bit of the range; return how many were clear."""
        chunks = self._chunks
        index = start >> _CHUNK_SHIFT
        base = index << _CHUNK_SHIFT
        if end - base > _CHUNK_BITS:
            return self._set_several(start, end)
        chunk = chunks.get(index)
        if chunk is _ONES:
            return 0
        changed = end - start
        if chunk is not None:
            changed -= chunk.count(1, start - base, end - base)
        if end - start == _CHUNK_BITS:
            chunks[index] = _ONES
        else:
            if chunk is None:
                chunks[index] = chunk = bitarray(_CHUNK_BITS)
            chunk[start - base : end - base] = 1
        return changed

    def _set_several(self, start: int, end: int) -> int:
        first, last = start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT
        changed = self.set(start, (first + 1) << _CHUNK_SHIFT)
        chunks = self._chunks
        for index in range(first + 1, last):
            chunk = chunks.get(index)
            if chunk is not _ONES:
                changed += _CHUNK_BITS if chunk is None else _CHUNK_BITS - chunk.count()
                chunks[index] = _ONES
        return changed + self.set(last << _CHUNK_SHIFT, end)

    def clear(self, start: int, end: int) -> int:
        """Clear every bit of the range; return how many were set. Empty chunks are given back."""
        chunks = self._chunks
        index = start >> _CHUNK_SHIFT
        base = index << _CHUNK_SHIFT
        if end - base > _CHUNK_BITS:
            return self._clear_several(start, end)
        chunk = chunks.get(index)
        if chunk is None:
            return 0
        if end - start == _CHUNK_BITS:
            del chunks[index]
            return _CHUNK_BITS if chunk is _ONES else chunk.count()
        count: int = chunk.count(1, start - base, end - base)
        if count:
            if chunk is _ONES:
                chunks[index] = chunk = bitarray(chunk)
            chunk[start - base : end - base] = 0
            if not chunk.any():
                del chunks[index]
        return count

    def _clear_several(self, start: int, end: int) -> int:
        first, last = start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT
        changed = self.clear(start, (first + 1) << _CHUNK_SHIFT)
        for index in self._present(first + 1, last):
            chunk = self._chunks.pop(index)
            changed += _CHUNK_BITS if chunk is _ONES else chunk.count()
        return changed + self.clear(last << _CHUNK_SHIFT, end)

    def count(self, start: int, end: int) -> int:
        """Count the bits that are set in the range."""
        first, last = start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT
        low, high = start & _CHUNK_MASK, end - (last << _CHUNK_SHIFT)
        chunks = self._chunks
        if first == last:
            # Nearly every conversion lies in one chunk: half the time of the general way below.
            chunk = chunks.get(first)
            return 0 if chunk is None else chunk.count(1, low, high)
        total = 0
        for index in self._present(first, last + 1):
            chunk = chunks.get(index)
            if chunk is None:
                continue  # a writer on another thread has just emptied it
            bit = low if index == first else 0
            end_bit = high if index == last else _CHUNK_BITS
            total += end_bit - bit if chunk is _ONES else chunk.count(1, bit, end_bit)
        return total

    def all(self, start: int, end: int) -> bool:
        """Whether every bit of the range is set; stops at the first that is not."""
        for index in range(start >> _CHUNK_SHIFT, ((end - 1) >> _CHUNK_SHIFT) + 1):
            chunk = self._chunks.get(index)
            if chunk is None:
                return False
            base = index << _CHUNK_SHIFT
            if (
                chunk is not _ONES
                and chunk.find(0, max(start - base, 0), min(end - base, _CHUNK_BITS)) >= 0
            ):
                return False
        return True

    def span(self, start: int, end: int, *, value: bool) -> tuple[int, int] | None:
        """
        Find the smallest range that holds every bit of the range that equals *value*.

        :return: Half-open, or None when there is no such bit.
        """
        head = next(self.runs(start, end, value=value), None)
        if head is None:
            return None
        return head[0], 1 + (self._last_set(start, end) if value else self._last_clear(start, end))

    def _last_set(self, start: int, end: int) -> int:
        """Find the last set bit of a range that has one."""
        found = -1
        for index in reversed(self._touched(start, end)):
            base = index << _CHUNK_SHIFT
            low, high = max(start - base, 0), min(end - base, _CHUNK_BITS)
            found = self._chunks[index].find(1, low, high, right=True)
            if found >= 0:
                return base + found
        return found

    def _last_clear(self, start: int, end: int) -> int:
        """Find the last clear bit of a range that has one."""
        index = (end - 1) >> _CHUNK_SHIFT
        while True:
            chunk = self._chunks.get(index)
            base = index << _CHUNK_SHIFT
            low, high = max(start - base, 0), min(end - base, _CHUNK_BITS)
            if chunk is None:
                return base + high - 1
            found = -1 if chunk is _ONES else chunk.find(0, low, high, right=True)
            if found >= 0:
                return base + found
            index -= 1

    def runs(self, start: int, end: int, *, value: bool = True) -> Iterator[tuple[int, int]]:
        """
        Yield the maximal runs of bits that equal *value*, clipped to the range, ascending, as (start, end).

        Chunks that are absent or all ones cost one step each, or less.
        """
        if not value:
            yield from self._gaps(start, end)
            return
        run_start = run_end = start
        for index, chunk, low, high in self._pieces(start, end):
            base = index << _CHUNK_SHIFT
            if chunk is _ONES:
                found, stop = low, high
            else:
                found = chunk.find(1, low, high)
                stop = low
            while found >= 0:
                if chunk is not _ONES:
                    stop = chunk.find(0, found, high)
                    if stop < 0:
                        stop = high
                if base + found == run_end and run_end > run_start:
                    run_end = base + stop
                else:
                    if run_end > run_start:
                        yield run_start, run_end
                    run_start, run_end = base + found, base + stop
                found = chunk.find(1, stop, high) if stop < high else -1
        if run_end > run_start:
            yield run_start, run_end

    def _gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        position = start
        for run_start, run_end in self.runs(start, end):
            if run_start > position:
                yield position, run_start
            position = run_end
        if position < end:
            yield position, end

    def save(self, start: int, end: int) -> SavedBits:
        """Copy the bits of the range, for :meth:`restore`."""
        return [
            # All ones are shared here too: the copy of a full terabyte costs what the terabyte costs.
            (index, low, _ONES if chunk is _ONES and high - low == _CHUNK_BITS else chunk[low:high])
            for index, chunk, low, high in self._pieces(start, end)
        ]

    def restore(self, start: int, end: int, saved: SavedBits) -> None:
        """Make the range again what :meth:`save` copied. Doing it twice is the same as doing it once."""
        self.clear(start, end)
        for index, low, bits in saved:
            if bits is _ONES:
                self._chunks[index] = _ONES
            elif bits.any():
                chunk = self._chunks.get(index)
                if chunk is None:
                    chunk = bitarray(_CHUNK_BITS)
                chunk[low : low + len(bits)] = bits
                self._chunks[index] = chunk
