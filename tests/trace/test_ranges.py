"""Values of ranges against a dict of addresses."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.trace import ranges as module
from ramblock.trace.ranges import RangeMap

END = 40
ADDRESSES = st.integers(0, END - 1)
VALUES = (None, "a", "b")


@pytest.mark.parametrize("most_runs", [2, 3, 2048])
@given(changes=st.lists(st.tuples(ADDRESSES, ADDRESSES, st.sampled_from(VALUES)), max_size=40))
def test_against_a_dict(changes: list[tuple[int, int, str | None]], most_runs: int) -> None:
    # Short blocks, so that few changes meet all of their borders.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_RUNS", most_runs)
        apply(changes, most_runs)


def apply(changes: list[tuple[int, int, str | None]], most_runs: int) -> None:
    values: RangeMap[str] = RangeMap()
    model: dict[int, str] = {}
    for one, other, value in changes:
        start, end = min(one, other), max(one, other) + 1
        values.set(start, end, value)
        for address in range(start, end):
            if value is None:
                model.pop(address, None)
            else:
                model[address] = value
        check(values, model, most_runs)


def check(values: RangeMap[str], model: dict[int, str], most_runs: int) -> None:
    pieces = values.pieces(0, END + 3)
    assert {a: value for start, end, value in pieces for a in range(start, end)} == model
    for (_, end, value), (start, _, following) in itertools.pairwise(pieces):
        assert end < start or (end == start and value is not following)  # maximal
    assert all(values.get(address) == model.get(address) for address in range(END + 3))
    assert all(start < end for start, end in values.gaps(0, END + 3))
    assert all(start < end for start, end, _ in pieces)
    gaps = {a for start, end in values.gaps(0, END + 3) for a in range(start, end)}
    assert gaps == set(range(END + 3)) - model.keys()
    for (_, end), (start, _) in itertools.pairwise(values.gaps(0, END + 3)):
        assert end < start  # maximal
    for start, end in ((0, END + 3), (3, 17), (0, 1 << 64)):
        inside = [address for address in model if start <= address < end]
        assert values.covered(start, end) == len(inside)
        assert values.last(start, end) == (max(inside) + 1 if inside else start)
        assert values.gaps(start, start) == []
        assert values.pieces(end, start) == []
        assert values.pieces(start, start) == []
        assert values.covered(end, start) == values.covered(start, start) == 0
        some = values.some(start, end, 2)
        assert len(some) >= min(2, len(values.pieces(start, end)))
        assert [a for first, last, _ in some for a in range(first, last)] == sorted(inside)[
            : sum(last - first for first, last, _ in some)
        ]
        assert values.gaps(start, end, 1)[:1] == values.gaps(start, end)[:1]
    assert bool(values) == bool(model)
    assert [starts[0] for starts, _ in values._blocks] == values._firsts
    for starts, kept in values._blocks:
        assert starts == sorted(set(starts))
        assert 1 <= len(starts) == len(kept) <= most_runs


def test_runs_of_one_value_are_one_and_take_no_more_than_one() -> None:
    values: RangeMap[str] = RangeMap()
    for address in range(0, 1 << 16, 16):
        values.set(address, address + 16, "a")
    assert values.pieces(0, 1 << 30) == [(0, 1 << 16, "a")]
    assert sum(len(starts) for starts, _ in values._blocks) <= 3


def test_what_was_filled_and_cleared_leaves_little() -> None:
    values: RangeMap[str] = RangeMap()
    for address in range(10_000):
        values.set(2 * address, 2 * address + 1, "a")
    for address in range(10_000):
        values.set(2 * address, 2 * address + 1, None)
    assert not values
    assert sum(len(starts) for starts, _ in values._blocks) <= 2


def test_the_size_of_a_range_costs_nothing() -> None:
    values: RangeMap[str] = RangeMap()
    values.set(5, (1 << 64) - 5, "a")
    values.set(1 << 39, (1 << 39) + 1, None)
    assert values.pieces(0, 1 << 64) == [
        (5, 1 << 39, "a"),
        ((1 << 39) + 1, (1 << 64) - 5, "a"),
    ]
    values.set(0, 1 << 64, None)
    assert not values


def test_what_was_cleared_is_as_new() -> None:
    values: RangeMap[str] = RangeMap()
    for address in range(0, 20_000, 2):
        values.set(address, address + 1, "a")
    assert values.covered(0, END) == END // 2
    assert values.covered(0, 1 << 64) == 10_000
    values.clear()
    assert not values
    assert values.covered(0, 1 << 64) == 0
    values.set(3, 5, "b")
    assert values.gaps(0, 9) == [(0, 3), (5, 9)]
    assert values.covered(0, 1 << 64) == 2
    for address in range(10, 20_000, 2):
        values.set(address, address + 1, "a")
    assert values.covered(0, 1 << 64) == 2 + 9_995


def test_what_was_cleared_counts_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_RUNS", 2)
    values: RangeMap[str] = RangeMap()
    for address in range(0, 64, 4):
        values.set(address, address + 2, "a")
    assert values.covered(0, 64) == 32
    values.clear()
    assert (values.pieces(0, 64), values.gaps(0, 64), values.covered(0, 64)) == ([], [(0, 64)], 0)
    for address in range(0, 64, 8):
        values.set(address, address + 2, "a")
    assert values.covered(0, 64) == 16
    assert sum(end - start for start, end in values.gaps(0, 64)) == 48
