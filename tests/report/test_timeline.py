"""What a picture of a trace keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.report.picture import Rectangle, Shade
from ramblock.report.timeline import Timeline

_PAGES = 8
_TARGETS = ("a", "b")
# (what, first page, pages)
_CHANGES = st.tuples(
    st.sampled_from(("private", "shared", "map a", "map b", "unmap a", "unmap b")),
    st.integers(0, _PAGES - 1),
    st.integers(1, _PAGES),
)


def _apply(timeline: Timeline, time: int, change: tuple[str, int, int]) -> None:
    what, start, size = change
    end = start + size
    word, _, target = what.partition(" ")
    if word == "map":
        timeline.mapped(time, target, start, end)
    elif word == "unmap":
        timeline.unmapped(time, target, start, end)
    else:
        timeline.page_state(time, start, end, private=what == "private")


def _shade(private: bool | None, mapped: bool) -> Shade:
    if private is None:
        return Shade.MAPPED if mapped else Shade.NOTHING
    if private:
        return Shade.STALE if mapped else Shade.PRIVATE
    return Shade.SHARED_MAPPED if mapped else Shade.SHARED


@given(changes=st.lists(_CHANGES, max_size=25))
def test_rectangles_are_what_pages_were(changes: list[tuple[str, int, int]]) -> None:
    """Page by page and moment by moment, against a model that keeps just that."""
    timeline = Timeline()
    pages = 2 * _PAGES
    private: list[bool | None] = [None] * pages
    mapped: list[set[str]] = [set() for _ in range(pages)]
    expected: dict[tuple[int, int], Shade] = {}
    for time, change in enumerate(changes, 1):
        _apply(timeline, time, change)
        what, start, size = change
        for page in range(start, start + size):
            word, _, target = what.partition(" ")
            if word == "map":
                mapped[page].add(target)
            elif word == "unmap":
                mapped[page].discard(target)
            else:
                private[page] = what == "private"
        for page in range(pages):
            expected[time, page] = _shade(private[page], bool(mapped[page]))
    drawn: dict[tuple[int, int], int] = {}
    for since, until, low, high, shade in timeline.rectangles():
        for time in range(since, until):
            for page in range(low, high):
                assert (time, page) not in drawn
                drawn[time, page] = shade
    last = len(changes)
    for key, shade in expected.items():
        if key[0] < last:
            assert drawn.get(key, Shade.NOTHING) == shade
    if changes:
        count = timeline.counts()[-1]
        now = [expected[last, page] for page in range(pages)]
        assert count.stale == now.count(Shade.STALE)
        assert count.shared == now.count(Shade.SHARED) + now.count(Shade.SHARED_MAPPED)


def test_too_many_rectangles_leave_the_long_and_the_stale() -> None:
    timeline = Timeline(most=10)
    time = 0
    timeline.page_state(0, 0, 1, private=True)
    timeline.mapped(1, "a", 0, 1)
    timeline.unmapped(
        3, "a", 0, 1
    )  # stale for two nanoseconds, among many that are longer and harmless
    for number in range(1, 200):
        timeline.page_state(time := time + 100 + number, 5, 6, private=bool(number % 2))
    rectangles = timeline.rectangles()
    assert Rectangle(1, 3, 0, 1, Shade.STALE) in rectangles
    assert len(rectangles) <= 22
    assert timeline.left_out >= 150
    assert timeline.left_out_below >= 100


def test_counts_are_bounded_and_keep_the_worst() -> None:
    timeline = Timeline(most=10)
    timeline.page_state(0, 0, 100, private=True)
    for number in range(200_000):
        timeline.page_state(10 * number + 1, 200, 201, private=bool(number % 2))
        if number == 77_777:
            timeline.mapped(10 * number + 2, "a", 0, 100)
            timeline.unmapped(10 * number + 3, "a", 0, 100)
    counts = timeline.counts()
    assert len(counts) <= 40_001
    assert max(count.stale for count in counts) == 100
    assert [count.time for count in counts] == sorted(count.time for count in counts)


@pytest.mark.parametrize("length", [10, 10_000, 10_000_000])
def test_rates_add_up(length: int) -> None:
    from ramblock.report.timeline import Rate

    rate = Rate()
    for number in range(10_000):
        rate.add(number * length)
    assert sum(rate.buckets.values()) == 10_000
    assert len(rate.buckets) <= 1_000
