from collections.abc import Callable

import pytest
from bitarray import frozenbitarray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ramblock import bitmap as module
from ramblock.bitmap import SparseBitmap

CHUNK = module._CHUNK_BITS
# Three chunks and a bit: a first, a middle, a last whole one, and one that the bitmap's end cuts.
LENGTH = 3 * CHUNK + 100

# The state machine below works on chunks of this many bits, because a naive set of a hundred
# thousand is slow; the tests of single operations use the real ones.
SMALL_SHIFT = 6
SMALL_CHUNK = 1 << SMALL_SHIFT
SMALL_LENGTH = 3 * SMALL_CHUNK + 10


@st.composite
def ranges(
    draw: st.DrawFn, chunk: int = SMALL_CHUNK, length: int = SMALL_LENGTH
) -> tuple[int, int]:
    """Draw a range, most of them with ends near the border of a chunk, where the mistakes are."""
    borders = st.sampled_from([*range(0, length, chunk), length])
    near = st.tuples(borders, st.integers(-3, 3)).map(lambda pair: min(max(sum(pair), 0), length))
    position = near | borders | st.integers(0, length)
    low, high = sorted(draw(st.tuples(position, position)))
    if low == high:
        low, high = (low - 1, high) if low else (low, high + 1)
    return low, high


class NaiveBitmap:
    """Half a dozen lines over a set: what the real one has to agree with."""

    def __init__(self) -> None:
        self.bits: set[int] = set()

    def runs(self, start: int, end: int, *, value: bool) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for bit in range(start, end):
            if (bit in self.bits) is not value:
                continue
            if found and found[-1][1] == bit:
                found[-1] = found[-1][0], bit + 1
            else:
                found.append((bit, bit + 1))
        return found


class AgreesWithASet(RuleBasedStateMachine):
    bitmap: SparseBitmap
    naive: NaiveBitmap

    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "_CHUNK_SHIFT", SMALL_SHIFT)
        self.patch.setattr(module, "_CHUNK_BITS", SMALL_CHUNK)
        self.patch.setattr(module, "_CHUNK_MASK", SMALL_CHUNK - 1)
        self.patch.setattr(module, "_ONES", frozenbitarray(b"\xff") * (SMALL_CHUNK // 8))
        self.bitmap = SparseBitmap(SMALL_LENGTH)
        self.naive = NaiveBitmap()

    def teardown(self) -> None:
        self.patch.undo()

    @rule(where=ranges())
    def set(self, where: tuple[int, int]) -> None:
        bits = set(range(*where))
        assert self.bitmap.set(*where) == len(bits - self.naive.bits)
        self.naive.bits |= bits

    @rule(where=ranges())
    def clear(self, where: tuple[int, int]) -> None:
        bits = set(range(*where))
        assert self.bitmap.clear(*where) == len(bits & self.naive.bits)
        self.naive.bits -= bits

    @rule(where=ranges(), changes=st.lists(st.tuples(st.booleans(), ranges()), max_size=3))
    def save_and_restore(
        self, where: tuple[int, int], changes: list[tuple[bool, tuple[int, int]]]
    ) -> None:
        saved = self.bitmap.save(*where)
        inside = set(range(*where))
        for value, (start, end) in changes:
            # Inside and outside: only what is inside comes back.
            if value:
                self.bitmap.set(start, end)
                self.naive.bits |= set(range(start, end)) - inside
            else:
                self.bitmap.clear(start, end)
                self.naive.bits -= set(range(start, end)) - inside
        for _ in range(2):
            self.bitmap.restore(*where, saved)
            assert self.bitmap.count(0, SMALL_LENGTH) == len(self.naive.bits)

    @rule(where=ranges())
    def questions(self, where: tuple[int, int]) -> None:
        bits = set(range(*where))
        assert self.bitmap.count(*where) == len(bits & self.naive.bits)
        for value in (True, False):
            found = self.naive.runs(*where, value=value)
            assert list(self.bitmap.runs(*where, value=value)) == found
            span = (found[0][0], found[-1][1]) if found else None
            assert self.bitmap.span(*where, value=value) == span

    @invariant()
    def agrees(self) -> None:
        assert self.bitmap.count(0, SMALL_LENGTH) == len(self.naive.bits)
        set_bits = {
            bit for start, end in self.bitmap.runs(0, SMALL_LENGTH) for bit in range(start, end)
        }
        assert set_bits == self.naive.bits

    @invariant()
    def takes_memory_only_where_something_is_set(self) -> None:
        assert all(chunk.any() for chunk in self.bitmap._chunks.values())


TestAgreesWithASet = AgreesWithASet.TestCase


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, LENGTH - 1])
@pytest.mark.parametrize("size", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_one_range(start: int, size: int) -> None:
    end = min(start + size, LENGTH)
    bitmap = SparseBitmap(LENGTH)
    assert bitmap.set(start, end) == end - start
    assert bitmap.set(start, end) == 0
    assert list(bitmap.runs(0, LENGTH)) == [(start, end)]
    gaps = [(low, high) for low, high in ((0, start), (end, LENGTH)) if low < high]
    assert list(bitmap.runs(0, LENGTH, value=False)) == gaps
    assert bitmap.clear(0, LENGTH) == end - start
    assert list(bitmap.runs(0, LENGTH)) == []
    assert not bitmap._chunks


def test_a_run_goes_on_over_every_kind_of_chunk() -> None:
    bitmap = SparseBitmap(LENGTH)
    bitmap.set(CHUNK - 5, LENGTH)  # a piece, two whole chunks, a piece
    assert list(bitmap.runs(0, LENGTH)) == [(CHUNK - 5, LENGTH)]
    bitmap.clear(2 * CHUNK, 2 * CHUNK + 1)  # a chunk that was all ones is a copy of its own now
    assert list(bitmap.runs(0, LENGTH)) == [(CHUNK - 5, 2 * CHUNK), (2 * CHUNK + 1, LENGTH)]
    assert list(bitmap.runs(0, LENGTH, value=False)) == [
        (0, CHUNK - 5),
        (2 * CHUNK, 2 * CHUNK + 1),
    ]


def test_two_bitmaps_do_not_share_what_one_of_them_changes() -> None:
    one, other = SparseBitmap(CHUNK), SparseBitmap(CHUNK)
    one.set(0, CHUNK)
    other.set(0, CHUNK)
    one.clear(7, 8)
    assert other.count(0, CHUNK) == CHUNK
    other.clear(0, CHUNK)
    other.set(0, CHUNK)
    assert other.count(0, CHUNK) == CHUNK
    assert list(one.runs(0, CHUNK, value=False)) == [(7, 8)]


def test_a_saved_copy_does_not_change_with_the_bitmap() -> None:
    bitmap = SparseBitmap(CHUNK)
    bitmap.set(3, 5)
    saved = bitmap.save(0, CHUNK)
    bitmap.set(0, CHUNK)
    bitmap.clear(4, 5)
    bitmap.restore(0, CHUNK, saved)
    assert list(bitmap.runs(0, CHUNK)) == [(3, 5)]
    bitmap.clear(3, 4)
    bitmap.restore(0, CHUNK, saved)
    assert list(bitmap.runs(0, CHUNK)) == [(3, 5)]


def test_restoring_a_part_of_a_full_chunk_leaves_the_rest() -> None:
    bitmap = SparseBitmap(2 * CHUNK)
    saved = bitmap.save(10, 20)
    bitmap.set(0, 2 * CHUNK)
    bitmap.restore(10, 20, saved)
    assert list(bitmap.runs(0, 2 * CHUNK)) == [(0, 10), (20, 2 * CHUNK)]


@pytest.mark.parametrize(
    "question",
    [
        lambda bitmap, end: list(bitmap.runs(0, end)),
        lambda bitmap, end: list(bitmap.runs(0, end, value=False)),
        lambda bitmap, end: bitmap.span(0, end, value=True),
        lambda bitmap, end: bitmap.count(0, end),
        lambda bitmap, end: bitmap.save(0, end),
        lambda bitmap, end: bitmap.clear(0, end),
    ],
)
def test_what_is_absent_is_not_walked(question: Callable[[SparseBitmap, int], object]) -> None:
    # 2**60 bits are 2**45 chunks: anything that walks over them does not come back.
    bitmap = SparseBitmap(1 << 60)
    bitmap.set(1 << 59, (1 << 59) + 1)
    question(bitmap, 1 << 60)


def test_full_chunks_are_shared_in_the_copy_too() -> None:
    # 16 TiB of 4 KiB pages. A copy of every chunk would be 512 MiB; a reference each is a hundredth
    # of that.
    bitmap = SparseBitmap(1 << 32)
    bitmap.set(0, 1 << 32)
    saved = bitmap.save(0, 1 << 32)
    assert len({id(bits) for _, _, bits in saved}) == 1
    bitmap.clear(5, 1 << 32)
    bitmap.restore(0, 1 << 32, saved)
    assert len({id(chunk) for chunk in bitmap._chunks.values()}) == 1
    assert bitmap.count(0, 1 << 32) == 1 << 32


@given(ranges(CHUNK, LENGTH), ranges(CHUNK, LENGTH))
def test_span_is_the_smallest_range_around_what_is_found(
    where: tuple[int, int], hole: tuple[int, int]
) -> None:
    bitmap = SparseBitmap(LENGTH)
    bitmap.set(*where)
    bitmap.clear(*hole)
    (start, end), (cut, uncut) = where, hole
    left = [(start, min(end, cut)), (max(start, uncut), end)]
    left = [(low, high) for low, high in left if low < high]
    assert bitmap.span(0, LENGTH, value=True) == ((left[0][0], left[-1][1]) if left else None)
    low, high = max(start, cut), min(end, uncut)
    assert bitmap.span(*where, value=False) == ((low, high) if low < high else None)


def test_empty_ranges_change_nothing() -> None:
    for at in (0, 5, CHUNK - 1, CHUNK, CHUNK + 1, LENGTH):
        bitmap = SparseBitmap(LENGTH)
        assert bitmap.count(at, at) == 0
        assert bitmap.clear(at, at) == 0
        assert list(bitmap.runs(at, at)) == []
        assert list(bitmap.runs(at, at, value=False)) == []
        assert bitmap.span(at, at, value=True) is None
        assert bitmap.save(at, at) == []
