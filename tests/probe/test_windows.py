"""
The table of windows beside a naive model: a set of windows, and the rules as they are written down.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.probe.files import MemoryFile
from ramblock.probe.windows import Rule, RuleBroken, UnmapRule, Window, WindowTable

P = 4096
PAGES = 12
LENIENT, EXACT = UnmapRule.LENIENT, UnmapRule.EXACT

calls = st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(1, PAGES))


@pytest.fixture
def file() -> Iterator[MemoryFile]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 8 * P)
    table = WindowTable(LENIENT, 1).files
    yield table.add(lambda: fd)
    table.close()


def add(table: WindowTable, address: int, size: int, **changed: Any) -> Window:
    arguments = {"readable": True, "writable": True, "file": None, "offset": 0}
    return table.add(address, size, **(arguments | changed))


def refused(table: WindowTable, *call: Any, **arguments: Any) -> tuple[Rule, str]:
    before = list(table.windows)
    what, address, size = call
    todo: Callable[[int, int], object] = (
        partial(add, table, **arguments) if what == "add" else table.remove
    )
    with pytest.raises(RuleBroken) as caught:
        todo(address, size)
    assert list(table.windows) == before
    return caught.value.rule, os.strerror(caught.value.errno)


@pytest.mark.parametrize("rule", UnmapRule)
@given(todo=st.lists(calls, max_size=40))
def test_the_table_agrees_with_the_model(
    rule: UnmapRule, todo: list[tuple[bool, int, int]]
) -> None:
    table = WindowTable(rule, limit=1000)
    model: set[tuple[int, int]] = set()
    for is_map, first, count in todo:
        start, end = first, first + count
        touched = {(low, high) for low, high in model if low < end and start < high}
        inside = {(low, high) for low, high in touched if start <= low and high <= end}
        if is_map:
            expected: object = Rule.OVERLAP if touched else None
            if not touched:
                model.add((start, end))
        elif not touched:
            expected = Rule.NOT_MAPPED
        elif rule is EXACT and touched != {(start, end)}:
            expected = Rule.INEXACT
        elif inside != touched:
            expected = Rule.BISECT
        else:
            expected = None
            model -= touched
        try:
            add(table, start * P, count * P) if is_map else table.remove(start * P, count * P)
            told = None
        except RuleBroken as error:
            told = error.rule
        assert told == expected
        assert {(w.address // P, w.end // P) for w in table.windows} == model
        for page in range(2 * PAGES):
            mapped = any(low <= page < high for low, high in model)
            assert bool(table.translate(page * P, 1, write=True)) is mapped


@pytest.mark.parametrize("what", ["add", "remove"])
def test_ranges_that_cannot_be(what: str) -> None:
    table = WindowTable(LENIENT, 10)
    assert refused(table, what, 0, 0) == (Rule.EMPTY, "Invalid argument")
    assert refused(table, what, 1, P) == (Rule.UNALIGNED, "Invalid argument")
    assert refused(table, what, 0, P + 1) == (Rule.UNALIGNED, "Invalid argument")
    assert refused(table, what, (1 << 64) - P, 2 * P) == (Rule.WRAP, "Invalid argument")
    assert refused(table, what, P, (1 << 64) - P + P) == (Rule.WRAP, "Invalid argument")


def test_the_last_page_of_the_address_space_is_a_page() -> None:
    table = WindowTable(LENIENT, 10)
    add(table, (1 << 64) - P, P)
    assert table.translate((1 << 64) - 1, 1, write=False)
    assert table.translate((1 << 64) - 1, 2, write=False) == []


def test_a_window_lies_inside_its_file(file: MemoryFile) -> None:
    table = WindowTable(LENIENT, 10)
    beyond = Rule.BEYOND_FILE, "Invalid argument"
    assert refused(table, "add", 0, 9 * P, file=file) == beyond
    assert refused(table, "add", 0, P, file=file, offset=8 * P) == beyond
    assert refused(table, "add", 0, P, file=file, offset=1 << 63) == beyond
    assert refused(table, "add", 0, P, file=file, offset=8)[0] is Rule.UNALIGNED
    add(table, 0, P, file=file, offset=7 * P)


def test_as_many_as_may_be() -> None:
    table = WindowTable(LENIENT, 2)
    add(table, 0, P)
    add(table, 2 * P, P)
    assert refused(table, "add", 4 * P, P) == (Rule.TOO_MANY, "No space left on device")


def test_access_is_what_the_flags_say() -> None:
    table = WindowTable(LENIENT, 10)
    assert refused(table, "add", 0, P, readable=False, writable=False)[0] is Rule.NO_ACCESS
    add(table, 0, P, writable=False)
    add(table, P, P)
    assert table.translate(P - 8, 16, write=False)
    assert table.translate(P - 8, 16, write=True) == []
    [(one, at, size), (other, *rest)] = table.translate(P - 8, 16, write=False)
    assert (one.address, at, size) == (0, P - 8, 8)
    assert (other.address, *rest) == (P, 0, 8)


def test_what_a_refused_unmap_named_is_stale_until_it_goes() -> None:
    table = WindowTable(EXACT, 10)
    windows = [add(table, page * P, P) for page in range(4)]
    assert refused(table, "remove", P, 2 * P)[0] is Rule.INEXACT
    assert [window.stale for window in windows] == [False, True, True, False]
    assert windows[1].refused_unmap == (P, 2 * P)
    assert table.remove(P, P) == [windows[1]]
    # The device still reaches the other.
    assert table.translate(2 * P, 1, write=True)


def test_what_sticks_out_of_a_refused_unmap_is_not_stale() -> None:
    table = WindowTable(LENIENT, 10)
    small, large = add(table, 0, P), add(table, P, 4 * P)
    assert refused(table, "remove", 0, 3 * P)[0] is Rule.BISECT
    assert (small.stale, large.stale) == (True, False)
