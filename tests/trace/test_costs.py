"""
The price of an event does not grow with the events before it, whatever a trace holds.

Steps are counted, lines of the audit that are run, at n events and at 4n. The bounds behind which
the rest is summed up are made small, so that few events reach them.
"""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from ramblock.trace import audit as audit_module
from ramblock.trace import conversions, faults, guest_audit, judge, mappings, places, ranges
from ramblock.trace.audit import Audit
from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Block,
    Conversion,
    Detach,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Region,
    Remark,
    Reset,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
)

PAGE = 4096
ALL = 1 << 40
SOURCE = Source("made", "made")
MS = 1_000_000

Step = tuple[Any, ...]


def maps_and_refused_unmaps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for _ in range(n):
        yield Unmap, "t", 0, ALL, None, False


def targets_and_attributes(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Attach, f"t{number}"
    for number in range(n):
        yield Attributes, number * PAGE, (number + 1) * PAGE, False
        yield Map, f"t{number}", number * PAGE, (number + 1) * PAGE


def maps_under_wide_flips(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for number in range(n):
        yield Attributes, 0, ALL, bool(number % 2)


def maps_and_wide_flips_in_turn(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
        yield Attributes, 0, ALL, bool(number % 2)


def private_runs_under_wide_maps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, True
    for _ in range(n):
        yield Map, "t", 0, ALL
        yield Unmap, "t", 0, ALL, ALL


def shared_runs_under_wide_maps(n: int) -> Iterator[Step]:
    yield Attach, "t"
    for number in range(n):
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, False
    for _ in range(n):
        yield Map, "t", 0, ALL
        yield Unmap, "t", 0, ALL, ALL


def narrow_flips_and_wide_ones(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, True
    for number in range(n):
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, False
        yield Attributes, 0, ALL, True


def slots_and_state_changes(n: int) -> Iterator[Step]:
    for number in range(n):
        start = number << 20
        yield Layout, (Block(f"slot {number}", start, start + PAGE, 0, True, start, number),)
    for number in range(n):
        yield StateChange, None, 0, PAGE, bool(number % 2)


def slots_of_one_memfd(n: int) -> Iterator[Step]:
    for number in range(n):
        start = number << 20
        yield Layout, (Block(f"slot {number}", start, start + PAGE, start, True, start, 7),)
    for number in range(n):
        yield StateChange, None, 0, n << 20, bool(number % 2)


def resets(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, False
    for _ in range(n):
        yield (Reset,)


def conversions_without_an_end(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Conversion, number * PAGE, (number + 1) * PAGE, True, f"v{number}"
    for number in range(n):
        yield Attributes, 0, ALL, bool(number % 2)


def many_vcpus(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Conversion, 0, ALL, True, f"v{number}"
        yield Attributes, 0, ALL, bool(number % 2), f"v{number}"
    for number in range(n):
        yield VcpuEntry, f"v{number}"


def plugs_over_many_maps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
        yield Attributes, 2 * number * PAGE, (2 * number + 1) * PAGE, False
    for number in range(n):
        yield PlugRequest, 0, ALL, bool(number % 2)
        yield Plug, 0, ALL, bool(number % 2)


def discards_over_many_maps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for _ in range(n):
        yield Discard, 0, ALL


def faults_and_unmaps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for number in range(n):
        yield Unmap, "t", 2 * number * PAGE, (2 * number + 1) * PAGE, PAGE
    for number in range(n):
        yield Access, "t", (2 * number + 1) * PAGE, None, True, True


def stale_remarks(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for _ in range(n):
        yield Remark, "stale", "was refused", "t", 0, ALL, True


def maps_over_maps(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Map, "t", 2 * number * PAGE, (2 * number + 1) * PAGE
    for _ in range(n):
        yield Map, "t", 0, ALL


def copies_over_copies(n: int) -> Iterator[Step]:
    for number in range(n):
        start, end = 2 * number * PAGE, (2 * number + 1) * PAGE
        for _ in range(3):
            yield Map, "t", start, end, True, True, start
    for _ in range(n):
        yield Map, "t", 0, ALL, True, True, 0
        yield Unmap, "t", 0, ALL, ALL


def unmapped_while_shared(n: int) -> Iterator[Step]:
    yield Attach, "t"
    yield Attributes, 0, ALL, False
    yield Map, "t", 0, ALL
    for number in range(n):
        yield Unmap, "t", 2 * number * PAGE, (2 * number + 1) * PAGE, PAGE
    for number in range(n):
        yield Attributes, 0, ALL, bool(number % 2)


def targets_that_come_and_go(n: int) -> Iterator[Step]:
    yield Attributes, 0, ALL, False
    for number in range(n):
        yield Attach, f"t{number}"
        yield Map, f"t{number}", 0, PAGE
        yield Detach, f"t{number}"


def regions(n: int) -> Iterator[Step]:
    for number in range(n):
        yield Region, 2 * number * PAGE, (2 * number + 1) * PAGE, True
    for _ in range(n):
        yield Region, 0, ALL, True
        yield Region, 0, ALL, False


PATTERNS: tuple[Callable[[int], Iterator[Step]], ...] = (
    maps_and_refused_unmaps,
    targets_and_attributes,
    maps_under_wide_flips,
    maps_and_wide_flips_in_turn,
    private_runs_under_wide_maps,
    shared_runs_under_wide_maps,
    narrow_flips_and_wide_ones,
    slots_and_state_changes,
    slots_of_one_memfd,
    resets,
    conversions_without_an_end,
    many_vcpus,
    plugs_over_many_maps,
    discards_over_many_maps,
    faults_and_unmaps,
    stale_remarks,
    maps_over_maps,
    copies_over_copies,
    unmapped_while_shared,
    targets_that_come_and_go,
    regions,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (ranges, "_MOST_RUNS", 16),
        (guest_audit, "_MOST", 8),
        (guest_audit, "_MOST_TARGETS", 8),
        (places, "_MOST", 16),
        (mappings, "_MOST_COPIES", 4),
        (judge, "_RECENT", 16),
        (faults, "_MOST", 16),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_four_times_the_events_cost_five_times_as_much_at_most(
    pattern: Callable[[int], Iterator[Step]], timed: bool
) -> None:
    few, many = (_steps(_events(pattern, n, timed=timed)) for n in (100, 400))
    assert few > 1000
    assert many <= 5 * few


@pytest.mark.usefixtures("small")
def test_many_guests_cost_no_more_each() -> None:
    def events(n: int) -> list[Event]:
        sources = [Source("made", "made", str(number)) for number in range(n)]
        return [
            Map(number * MS, source, number, "t", 0, PAGE)
            for number in range(2 * n)
            for source in (sources[number % n],)
        ]

    few, many = (_steps(events(n)) for n in (100, 400))
    assert many <= 5 * few


def _events(pattern: Callable[[int], Iterator[Step]], n: int, *, timed: bool) -> list[Event]:
    return [
        kind(line * MS * 2 if timed else None, SOURCE, line, *fields)
        for line, (kind, *fields) in enumerate(pattern(n), start=1)
    ]


_COUNTED = {
    module.__file__
    for module in (audit_module, conversions, faults, guest_audit, judge, mappings, places, ranges)
}


def _steps(events: list[Event]) -> int:
    count = 0

    def line(_frame: FrameType, what: str, _argument: object) -> Any:
        nonlocal count
        count += what == "line"
        return line

    def call(frame: FrameType, _what: str, _argument: object) -> Any:
        return line if frame.f_code.co_filename in _COUNTED else None

    before = sys.gettrace()
    audit = Audit()
    sys.settrace(call)
    try:
        audit.feed(events)
        audit.finish()
    finally:
        sys.settrace(before)
    return count
