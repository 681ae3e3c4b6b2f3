"""The verifier by itself: told of calls one by one, it finds exactly the wrong ones."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma import DmaCapabilities, HostRange
from ramblock.errors import DmaError
from ramblock.hostmem import MemfdBacking
from ramblock.testing import (
    CheckedShared,
    CheckedTarget,
    Region,
    Verifier,
    Violation,
    ViolationKind,
)
from ramblock.testing.marks import MarkedPages, Marks
from ramblock.testing.reach import MAPPED, Reach
from ramblock.units import MIB

PAGE = 4096
HOST = 0x7F00_0000_0000  # where the guest's page 0 is


def host(first: int, count: int) -> HostRange:
    return HostRange(None, 0, HOST + first * PAGE, count * PAGE)


@pytest.fixture
def verifier() -> Verifier:
    return Verifier([Region(0, 16 * PAGE, confidential=True)], ["one", "two"])


def share(verifier: Verifier, first: int, count: int) -> None:
    verifier.has_made_shared(first * PAGE, count * PAGE)


def map_pages(verifier: Verifier, target: str, first: int, count: int) -> None:
    verifier.about_to_map(target, first * PAGE, host(first, count))
    verifier.has_mapped(target, first * PAGE, host(first, count))


# -- targets and attributes -----------------------------------------------------------------------


def test_a_map_of_a_private_page(verifier: Verifier) -> None:
    verifier.about_to_map("one", 0, host(0, 1))
    assert verifier.counts == {ViolationKind.STALE: 1}


def test_an_attribute_that_changes_under_a_mapping(verifier: Verifier) -> None:
    share(verifier, 0, 4)
    map_pages(verifier, "two", 0, 4)
    assert verifier.clean
    verifier.about_to_make_private(PAGE, PAGE)
    assert verifier.violations() == [Violation(ViolationKind.STALE, "two", PAGE, PAGE)]
    (line,) = verifier.story
    assert line == (
        "private attribute [0x1000, 0x2000): stale mapping: a private page is mapped"
        " by two: [0x1000, 0x2000)"
    )


def test_a_page_that_is_mapped_twice(verifier: Verifier) -> None:
    share(verifier, 0, 3)
    map_pages(verifier, "one", 1, 1)
    map_pages(verifier, "two", 0, 3)
    assert verifier.clean
    map_pages(verifier, "one", 0, 3)
    assert verifier.violations() == [Violation(ViolationKind.DOUBLE, "one", PAGE, PAGE)]


@pytest.mark.parametrize("told", [0, PAGE, 3 * PAGE, None, True])
def test_an_unmap_that_tells_a_wrong_number(verifier: Verifier, told: object) -> None:
    share(verifier, 0, 3)
    map_pages(verifier, "one", 0, 2)
    verifier.has_unmapped("one", 0, 3 * PAGE, told)
    assert verifier.counts == {ViolationKind.UNMAP_COUNT: 1}
    assert verifier.violations() == [Violation(ViolationKind.UNMAP_COUNT, "one", 0, 3 * PAGE)]


@pytest.mark.parametrize(("told", "right"), [(PAGE, True), (3 * PAGE, True), (0, False)])
def test_a_call_that_may_have_been_carried_out(verifier: Verifier, told: int, right: bool) -> None:
    share(verifier, 0, 4)
    map_pages(verifier, "one", 0, 1)
    verifier.may_have_mapped("one", PAGE, host(1, 2))
    verifier.has_unmapped("one", 0, 3 * PAGE, told)
    assert verifier.clean is right


def test_an_unmap_that_may_have_been_carried_out(verifier: Verifier) -> None:
    share(verifier, 0, 2)
    map_pages(verifier, "one", 0, 2)
    verifier.may_have_unmapped("one", 0, 4 * PAGE)
    verifier.has_unmapped("one", 0, 4 * PAGE, 0)
    assert verifier.clean


# -- freeing --------------------------------------------------------------------------------------


def test_a_free_under_a_mapping_and_of_a_page_in_use(verifier: Verifier) -> None:
    share(verifier, 0, 1)
    map_pages(verifier, "one", 0, 1)
    verifier.about_to_free_shared(HOST, 2 * PAGE, gpa=0)
    assert verifier.counts == {ViolationKind.FREED: 1, ViolationKind.LOST_FREE: 1}
    verifier.about_to_free_private(0, 2 * PAGE)
    assert verifier.counts[ViolationKind.LOST_FREE] == 2


def test_memory_is_followed_wherever_it_is_mapped(verifier: Verifier) -> None:
    # Page 4 of the host at two addresses; what was there before leads elsewhere now.
    far = 1 << 40
    verifier.has_mapped("one", far, host(0, 8))
    verifier.has_unmapped("one", far, 8 * PAGE, 8 * PAGE)
    verifier.has_mapped("one", far, host(4, 2))
    verifier.has_mapped("two", 0, host(4, 1))
    verifier.about_to_free_shared(HOST, 4 * PAGE)
    assert verifier.clean
    verifier.about_to_free_shared(HOST + 4 * PAGE, PAGE)
    assert verifier.violations() == [
        Violation(ViolationKind.FREED, "two", 0, PAGE),
        Violation(ViolationKind.FREED, "one", far, PAGE),
    ]


def test_addresses_are_given_out_again(verifier: Verifier) -> None:
    backing = CheckedShared(verifier, MemfdBacking("ram", PAGE))
    verifier.about_to_make_memory_private(backing.address, PAGE)
    backing.discard(0, PAGE)
    assert set(verifier.freed_pages) == set(verifier.private_memory) == {backing.address}
    backing.close()
    assert not verifier.freed_pages
    assert not verifier.private_memory


# -- devices --------------------------------------------------------------------------------------


def test_a_device_in_private_memory_and_one_that_was_just_in_time(verifier: Verifier) -> None:
    share(verifier, 0, 1)
    since = verifier.before_access()
    verifier.about_to_make_private(0, PAGE)
    verifier.device_reached("one", 0, 64, since)
    assert verifier.clean, "the access began while the page was shared"
    verifier.device_reached("one", 0, 64, verifier.before_access())
    assert verifier.counts == {ViolationKind.DEVICE_REACHED_PRIVATE: 1}


def test_only_what_became_private_during_the_access_is_excused(verifier: Verifier) -> None:
    share(verifier, 0, 8)
    verifier.about_to_make_private(0, PAGE)
    since = verifier.before_access()
    verifier.about_to_make_private(0, 2 * PAGE)  # page 0 was private before
    verifier.about_to_make_private(3 * PAGE, PAGE)
    verifier.device_reached("one", 0, 5 * PAGE, since)
    assert verifier.violations() == [
        Violation(ViolationKind.DEVICE_REACHED_PRIVATE, "one", 0, PAGE)
    ]


def test_an_access_that_takes_thousands_of_conversions(verifier: Verifier) -> None:
    share(verifier, 0, 2)
    verifier.before_access()
    for _ in range(5000):
        verifier.about_to_make_private(0, PAGE)
        verifier.has_made_shared(0, PAGE)
    since = verifier.before_access()
    verifier.about_to_make_private(PAGE, PAGE)
    for _ in range(5000):
        verifier.about_to_make_private(0, PAGE)
        verifier.has_made_shared(0, PAGE)
    assert len(verifier._changes) < 6000, "no more than an access can ask about"
    verifier.device_reached("one", PAGE, PAGE, since)
    assert verifier.clean


# -- at the end -----------------------------------------------------------------------------------


def test_a_missing_mapping(verifier: Verifier) -> None:
    share(verifier, 0, 4)
    map_pages(verifier, "one", 0, 2)
    map_pages(verifier, "two", 0, 4)
    tables = {"one": [(0, 2 * PAGE)], "two": [(0, 4 * PAGE)]}
    verifier.compare([(0, 4 * PAGE)], tables, attached=False)
    assert verifier.clean
    verifier.compare([(0, 4 * PAGE)], tables, attached=True)
    assert verifier.violations() == [Violation(ViolationKind.MISSING, "one", 2 * PAGE, 2 * PAGE)]


def test_a_table_that_differs_from_the_calls(verifier: Verifier) -> None:
    share(verifier, 0, 4)
    map_pages(verifier, "one", 0, 2)
    map_pages(verifier, "two", 0, 4)
    verifier.may_have_unmapped("two", 3 * PAGE, PAGE)
    tables = {"one": [(PAGE, 4 * PAGE)], "two": [(0, 3 * PAGE)]}
    verifier.compare([(0, 4 * PAGE)], tables, attached=False)
    assert verifier.violations() == [
        Violation(ViolationKind.STALE, "one", 4 * PAGE, PAGE),
        Violation(ViolationKind.UNMAP_COUNT, "one", 2 * PAGE, 3 * PAGE),
        Violation(ViolationKind.UNMAP_COUNT, "one", 0, PAGE),
    ]


def test_states_that_differ_from_attributes(verifier: Verifier) -> None:
    share(verifier, 0, 2)
    verifier.compare([(PAGE, 2 * PAGE)], {}, attached=False)
    assert verifier.counts == {ViolationKind.STATE: 1}
    assert verifier.violations() == [
        Violation(ViolationKind.STATE, "", 0, PAGE),
        Violation(ViolationKind.STATE, "", 2 * PAGE, PAGE),
    ]


def test_the_story_ends_and_the_counts_go_on(verifier: Verifier) -> None:
    for _ in range(1100):
        verifier.violation(ViolationKind.LOST_WRITE, "one", 0, 64)
    assert verifier.counts == {ViolationKind.LOST_WRITE: 1100}
    assert len(verifier.story) == 1000


def test_time_is_accounted_by_thread(verifier: Verifier) -> None:
    other = threading.Thread(target=share, args=(verifier, 0, 16))
    other.start()
    other.join()
    assert verifier.spent_here_ns() == 0
    assert verifier.spent_ns() > 0
    assert verifier.checks == 1


# -- targets that list ----------------------------------------------------------------------------


class Telling:
    """A target that does nothing, and answers as it was told to."""

    capabilities = DmaCapabilities()

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.answer = PAGE

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if self.error is not None:
            raise self.error

    def unmap(self, iova: int, size: int) -> int:
        if self.error is not None:
            raise self.error
        return self.answer

    def close(self) -> None:
        pass


class Extent:
    def __init__(self, iova: int, size: int) -> None:
        self.iova = iova
        self.size = size


@pytest.mark.parametrize("listed", [[], [(0, 2)], [(0, 1), (1, 1)], [(1, 2)]])
def test_a_target_whose_list_differs_from_what_it_did(listed: list[tuple[int, int]]) -> None:
    verifier, inner = Verifier(), Telling()
    verifier.watch("it", lambda: [Extent(first * PAGE, count * PAGE) for first, count in listed])
    target = CheckedTarget(verifier, "it", inner)
    target.map(0, host(0, 2))
    right = {first + page for first, count in listed for page in range(count)} == {0, 1}
    assert verifier.clean is right


@pytest.mark.parametrize(
    ("error", "reached", "clean"),
    [
        (DmaError("refused"), False, True),
        (DmaError("refused"), True, False),
        (DmaError("who knows", in_doubt=True), False, True),
        (DmaError("who knows", in_doubt=True), True, True),
        (KeyboardInterrupt(), True, True),
    ],
)
def test_only_a_refusal_says_that_nothing_was_done(
    error: BaseException, reached: bool, clean: bool
) -> None:
    verifier, inner = Verifier(), Telling()
    verifier.watch("it", lambda: [Extent(0, PAGE)] if reached else [])
    target = CheckedTarget(verifier, "it", inner)
    inner.error = error
    with pytest.raises(type(error)):
        target.map(0, host(0, 1))
    assert verifier.clean is clean


def test_after_an_uncertain_call_the_list_is_believed() -> None:
    verifier, inner = Verifier(), Telling()
    there = [Extent(0, PAGE)]
    verifier.watch("it", lambda: there)
    target = CheckedTarget(verifier, "it", inner)
    inner.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        target.map(0, host(0, 2))
    inner.error = None
    there.clear()
    target.unmap(0, 2 * PAGE)  # answers one page, and that is right
    assert verifier.clean


def test_a_target_that_was_closed_maps_nothing() -> None:
    verifier = Verifier(targets=["it"])
    target = CheckedTarget(verifier, "it", Telling())
    target.map(0, host(0, 2))
    assert verifier.maps_memory(HOST, 2 * PAGE)
    target.close()
    assert not verifier.maps_memory(HOST, 2 * PAGE)


# -- the paper ------------------------------------------------------------------------------------

# The interesting pages are those around a border of two arrays, at 16 MiB.
BORDER = 16 * MIB
ends = st.integers(BORDER - 4 * PAGE, BORDER + 4 * PAGE)


@given(
    puts=st.lists(st.tuples(st.integers(0, 3), ends, ends), max_size=8),
    asked=st.tuples(ends, ends),
    mark=st.integers(1, 3),
)
def test_marks_are_what_a_dictionary_would_hold(
    puts: list[tuple[int, int, int]], asked: tuple[int, int], mark: int
) -> None:
    marks: Marks = Marks()
    naive: dict[int, int] = {}
    for value, one, other in puts:
        start, end = min(one, other), max(one, other) + 1
        marks.put(value, start, end)
        naive.update(dict.fromkeys(range(start // PAGE, -(-end // PAGE)), value))
    start, end = min(asked), max(asked) + 1
    pages = range(start // PAGE, -(-end // PAGE))
    marked = {page for page in pages if naive.get(page) == mark}

    def flat(stretches: list[tuple[int, int]]) -> set[int]:
        assert all(low < high for low, high in stretches)
        assert all(one[1] < other[0] for one, other in pairwise(stretches))
        return {page for low, high in stretches for page in range(low // PAGE, -(-high // PAGE))}

    assert flat(list(marks.where(mark, start, end))) == marked
    assert flat(list(marks.elsewhere(mark, start, end))) == set(pages) - marked
    assert marks.count(mark, start, end) == len(marked)
    everywhere = {page for page, value in naive.items() if value == mark}
    assert flat(list(marks.everywhere(mark))) == everywhere
    assert set(MarkedPages(marks, mark)) == {page * PAGE for page in everywhere}
    assert len(MarkedPages(marks, mark)) == len(everywhere)
    assert all(marks.get(page * PAGE + 1) == naive.get(page, 0) for page in pages)
    same = Marks()
    for page, value in naive.items():
        same.put(value, page * PAGE, page * PAGE + 1)
    assert marks == same
    same.put(4, end, end + 1)
    assert marks != same


def test_marked_pages_are_a_set_that_changes() -> None:
    marks = Marks()
    marks.put(1, 0, 4 * PAGE)
    marks.put(2, PAGE, 2 * PAGE)
    pages = MarkedPages(marks, 1)
    assert pages | {BORDER} == {0, 2 * PAGE, 3 * PAGE, BORDER}
    assert pages & {PAGE, 2 * PAGE} == {2 * PAGE}
    assert repr(pages) == "{0x0, 0x2000, 0x3000}"
    pages.add(BORDER)
    pages.difference_update([0, PAGE])
    assert set(pages) == {2 * PAGE, 3 * PAGE, BORDER}
    pages.clear()
    assert not pages
    assert set(MarkedPages(marks, 2)) == {PAGE}, "the others keep theirs"


@given(
    maps=st.lists(
        st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(0, 3), st.booleans()),
        max_size=12,
    ),
    address=st.integers(0, 12),
    count=st.integers(1, 12),
)
def test_where_memory_is_mapped_is_what_a_dictionary_would_hold(
    maps: list[tuple[int, int, int, bool]], address: int, count: int
) -> None:
    reach = Reach()
    naive: dict[int, int] = {}
    for first, size, distance, keep in maps:
        memory = HostRange(None, 0, (first + distance) * PAGE, size * PAGE)
        reach.note(MAPPED, first * PAGE, memory)
        naive.update({page: page + distance for page in range(first, first + size)})
        if not keep:
            reach.mapped.put(0, first * PAGE, (first + size) * PAGE)
            for page in range(first, first + size):
                del naive[page]
    found = {
        page // PAGE
        for low, high in reach.to_memory(address * PAGE, count * PAGE)
        for page in range(low, high, PAGE)
    }
    assert found == {page for page, leads in naive.items() if address <= leads < address + count}


def test_only_what_draws_examples_needs_hypothesis() -> None:
    code = (
        "import sys; import ramblock.testing; assert 'hypothesis' not in sys.modules; "
        "import ramblock.testing.conformance; assert 'hypothesis' in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
