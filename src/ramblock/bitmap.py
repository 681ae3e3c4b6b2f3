# SPDX-License-Identifier: Apache-2.0
"""
A bitmap that takes memory only where something is set.

The bits are cut into chunks of 2**16 (256 MiB of 4 KiB pages). A chunk that is absent is all zeros.
A chunk that one operation fills is the one shared, immutable :data:`_ONES`: to fill or empty a
terabyte costs a dictionary entry per 256 MiB. Every cost depends on the range and the bits set
inside it, not on the length of the bitmap.

Ranges lie inside the bitmap: the layers above check. Readers need no lock for their own safety:
beside a writer they see each bit before or after (beside an undo: or clear).
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray, frozenbitarray

from ramblock.ranges import complement

# A guest that touches a single bit makes us allocate a chunk: 8 KiB. 2**15 bits take half of that,
# and a conversion of 1 GiB is a quarter slower.
_CHUNK_SHIFT = 16
_CHUNK_BITS = 1 << _CHUNK_SHIFT
_CHUNK_MASK = _CHUNK_BITS - 1
_ONES = frozenbitarray(b"\xff") * (_CHUNK_BITS // 8)

#: The copy that :meth:`SparseBitmap.save` makes: chunk, first bit in it, the bits.
SavedBits = list[tuple[int, int, bitarray]]


class SparseBitmap:
    """*length* bits, all clear at first."""

    __slots__ = ("_chunks", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._chunks: dict[int, bitarray] = {}

    def _present(self, first: int, last: int) -> list[int]:
        # The chunks that exist from *first* to *last*, ascending.
        chunks = self._chunks
        if first == last:
            return [first] if first in chunks else []
        if last - first < len(chunks):
            return [index for index in range(first, last + 1) if index in chunks]
        # list(dict) is one step for other threads; iterating over the dictionary itself is not.
        return sorted(index for index in list(chunks) if first <= index <= last)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, bitarray, int, int]]:
        # The chunks that exist, with the part of each that lies in the range of bits.
        for index in self._present(start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT):
            chunk = self._chunks.get(index)
            if chunk is not None:  # else a writer on another thread has just emptied it
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
            last = (end - 1) >> _CHUNK_SHIFT
            changed = self.set(start, base + _CHUNK_BITS) + self.set(last << _CHUNK_SHIFT, end)
            for middle in range(index + 1, last):
                chunk = chunks.get(middle)
                if chunk is not _ONES:
                    changed += _CHUNK_BITS if chunk is None else _CHUNK_BITS - chunk.count()
                    chunks[middle] = _ONES
            return changed
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

    def clear(self, start: int, end: int) -> int:
        """Clear every bit of the range; return how many were set. Empty chunks are given back."""
        chunks = self._chunks
        index = start >> _CHUNK_SHIFT
        base = index << _CHUNK_SHIFT
        if end - base > _CHUNK_BITS:
            last = (end - 1) >> _CHUNK_SHIFT
            changed = self.clear(start, base + _CHUNK_BITS) + self.clear(last << _CHUNK_SHIFT, end)
            for middle in self._present(index + 1, last - 1):
                whole = chunks.pop(middle)
                changed += _CHUNK_BITS if whole is _ONES else whole.count()
            return changed
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

    def count(self, start: int, end: int) -> int:
        """Count the bits that are set in the range."""
        index = start >> _CHUNK_SHIFT
        base = index << _CHUNK_SHIFT
        if end - base <= _CHUNK_BITS:
            # Nearly every conversion lies in one chunk: half the time of the general way below.
            chunk = self._chunks.get(index)
            return 0 if chunk is None else chunk.count(1, start - base, end - base)
        return sum(
            high - low if chunk is _ONES else chunk.count(1, low, high)
            for _, chunk, low, high in self._pieces(start, end)
        )

    def span(self, start: int, end: int, *, value: bool) -> tuple[int, int] | None:
        """Find the smallest range around all bits in it that equal *value*; None: there is none."""
        runs = self.runs(start, end)
        head = next(runs if value else complement(runs, start, end), None)
        if head is None:
            return None
        first, last = start >> _CHUNK_SHIFT, (end - 1) >> _CHUNK_SHIFT
        # Set bits are where chunks exist, clear ones may be anywhere.
        indexes = reversed(self._present(first, last)) if value else range(last, first - 1, -1)
        for index in indexes:
            chunk = self._chunks.get(index)
            base = index << _CHUNK_SHIFT
            low, high = max(start - base, 0), min(end - base, _CHUNK_BITS)
            if chunk is None or chunk is _ONES:
                found = high - 1 if value is (chunk is _ONES) else -1
            else:
                found = chunk.find(value, low, high, right=True)
            if found >= 0:
                return head[0], base + found + 1
        return None  # a writer on another thread has just changed it

    def runs(self, start: int, end: int, *, value: bool = True) -> Iterator[tuple[int, int]]:
        """Yield the maximal runs (start, end) of bits that equal *value*, clipped, ascending."""
        if not value:
            yield from complement(self.runs(start, end), start, end)
            return
        run_start = run_end = start
        for index, chunk, low, high in self._pieces(start, end):
            base = index << _CHUNK_SHIFT
            # A chunk of ones is one step.
            found = low if chunk is _ONES else chunk.find(1, low, high)
            while found >= 0:
                stop = high if chunk is _ONES else chunk.find(0, found, high)
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

    def save(self, start: int, end: int) -> SavedBits:
        """Copy the bits of the range, for :meth:`restore`."""
        return [
            # All ones are shared here too: the copy of a terabyte costs no more than the terabyte.
            (index, low, _ONES if chunk is _ONES and high - low == _CHUNK_BITS else chunk[low:high])
            for index, chunk, low, high in self._pieces(start, end)
        ]

    def restore(self, start: int, end: int, saved: SavedBits) -> None:
        """Put back the copy of :meth:`save`. Doing it twice is the same as doing it once."""
        self.clear(start, end)
        for index, low, bits in saved:
            if bits is _ONES:
                self._chunks[index] = _ONES
            elif bits.any():
                chunk = self._chunks.get(index) or bitarray(_CHUNK_BITS)
                chunk[low : low + len(bits)] = bits
                self._chunks[index] = chunk
