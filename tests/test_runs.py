from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE, PageSource, PageSourceWithRanges, runs
from ramblock.discard.sources import joint_runs, populated_in
from ramblock.errors import UsageError
from ramblock.ranges import clip, complement, merge

COUNT = 24
END = COUNT * PAGE

page_sets = st.sets(st.integers(0, COUNT - 1))
windows = st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)).map(
    lambda pair: (min(pair) * PAGE, max(pair) * PAGE)
)


def as_runs(numbers: set[int]) -> list[tuple[int, int]]:
    return [(offset, offset + size) for offset, size in runs(numbers)]


def inside(numbers: set[int], window: tuple[int, int]) -> set[int]:
    return {number for number in numbers if window[0] <= number * PAGE < window[1]}


def as_pages(found: list[tuple[int, int]]) -> set[int]:
    return {number for start, end in found for number in range(start // PAGE, end // PAGE)}


@given(page_sets)
def test_complement(numbers: set[int]) -> None:
    rest = list(complement(iter(as_runs(numbers)), 0, END))
    assert rest == as_runs(set(range(COUNT)) - numbers)


def test_complement_of_nothing_and_of_all() -> None:
    assert list(complement(iter(()), 5, 9)) == [(5, 9)]
    assert list(complement(iter([(5, 9)]), 5, 9)) == []
    assert list(complement(iter(()), 5, 5)) == []


def test_complement_takes_runs_that_touch_or_overlap() -> None:
    assert list(complement(iter([(1, 3), (3, 4), (2, 6)]), 0, 8)) == [(0, 1), (6, 8)]


@given(page_sets, windows)
def test_populated_in_does_not_depend_on_whether_a_source_names_its_runs(
    numbers: set[int], window: tuple[int, int]
) -> None:
    expected = as_runs(inside(numbers, window))
    assert list(populated_in(PageSource(numbers), *window)) == expected
    if window[0] < window[1]:
        assert list(populated_in(PageSourceWithRanges(numbers), *window)) == expected


@given(st.sets(st.integers(0, COUNT // 4 - 1)), windows)
def test_populated_in_asks_per_granule_and_clips(
    granules: set[int], window: tuple[int, int]
) -> None:
    numbers = {granule * 4 + page for granule in granules for page in range(4)}
    source = PageSource(numbers, granularity=4 * PAGE)
    assert list(populated_in(source, *window)) == as_runs(inside(numbers, window))
    # One question per granule that the window touches, never one per page.
    touched = {number // 4 for number in as_pages([window])}
    assert source.asked == len(touched)


def test_populated_in_off_the_page_grid() -> None:
    source = PageSource({1, 2}, granularity=PAGE)
    assert list(populated_in(source, PAGE + 100, 3 * PAGE - 1)) == [(PAGE + 100, 3 * PAGE - 1)]
    assert list(populated_in(source, 100, 4 * PAGE)) == [(PAGE, 3 * PAGE)]


def test_a_source_with_ranges_is_not_asked_page_by_page() -> None:
    source = PageSourceWithRanges({1, 2, 5})
    assert list(populated_in(source, 0, END)) == [(PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert source.asked == 0


@given(page_sets, page_sets, page_sets, windows)
def test_intersection_of_several_sources(
    one: set[int], two: set[int], three: set[int], window: tuple[int, int]
) -> None:
    joint = iter((window,)) if window[0] < window[1] else iter(())
    sources = (PageSource(one), PageSourceWithRanges(two), PageSource(three))
    found = list(joint_runs(joint, sources))
    assert found == as_runs(inside(one & two & three, window))


def test_merge() -> None:
    assert list(merge(iter([(0, 1), (1, 2), (2, 5), (6, 7), (7, 8)]))) == [(0, 5), (6, 8)]
    assert list(merge([(0, 9), (1, 2), (4, 12), (12, 13)])) == [(0, 13)]
    assert list(merge(iter(()))) == []


def test_everything_is_lazy() -> None:
    asked = 0

    class Counting(PageSourceWithRanges):
        def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
            nonlocal asked
            for run in super().ranges(offset, size):
                asked += 1
                yield run

    source = Counting(range(0, COUNT, 2))
    found = joint_runs(iter([(0, END)]), (source,))
    assert asked == 0
    assert next(found) == (0, PAGE)
    # One more than was given out: whether it touches can only be told by looking at it.
    assert asked == 2


@given(page_sets, windows)
def test_clip(numbers: set[int], window: tuple[int, int]) -> None:
    found = list(clip(iter(as_runs(numbers)), *window))
    assert as_pages(found) == inside(numbers, window)
    assert all(window[0] <= start < end <= window[1] for start, end in found)


class Answering:
    """A source whose answer is made up."""

    granularity = PAGE

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers = answers

    def is_populated(self, offset: int, size: int) -> bool:
        raise AssertionError("it has ranges")

    def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        return iter(self.answers)


def test_the_answer_of_a_source_is_clipped() -> None:
    whole_granules = Answering((0, 4 * PAGE), (8 * PAGE, 4 * PAGE), (20 * PAGE, PAGE))
    found = list(populated_in(whole_granules, 2 * PAGE, 9 * PAGE))
    assert found == [(2 * PAGE, 4 * PAGE), (8 * PAGE, 9 * PAGE)]


@pytest.mark.parametrize(
    "answers",
    [
        ((4 * PAGE, PAGE), (2 * PAGE, PAGE)),  # not ascending
        ((2 * PAGE, 2 * PAGE), (3 * PAGE, PAGE)),  # overlapping
        ((2 * PAGE, 0),),
        ((2 * PAGE, -PAGE),),
    ],
)
def test_an_answer_that_cannot_be_meant_is_refused(answers: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UsageError, match="does not lie behind"):
        list(populated_in(Answering(*answers), 0, END))
