from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE, PageSource, PageSourceWithRanges, runs
from ramblock.ranges import complement, intersect, merge_adjacent, populated_in

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
    for source in (PageSource(one), PageSourceWithRanges(two), PageSource(three)):
        joint = intersect(joint, source)
    found = list(merge_adjacent(joint))
    assert found == as_runs(inside(one & two & three, window))


def test_merge_adjacent() -> None:
    assert list(merge_adjacent(iter([(0, 1), (1, 2), (2, 5), (6, 7), (7, 8)]))) == [(0, 5), (6, 8)]
    assert list(merge_adjacent(iter(()))) == []


def test_everything_is_lazy() -> None:
    asked = 0

    class Counting(PageSourceWithRanges):
        def ranges(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
            nonlocal asked
            for run in super().ranges(offset, size):
                asked += 1
                yield run

    source = Counting(range(0, COUNT, 2))
    found = merge_adjacent(intersect(iter([(0, END)]), source))
    assert asked == 0
    assert next(found) == (0, PAGE)
    # One more than was given out: whether it touches can only be told by looking at it.
    assert asked == 2
