"""
The audit against a naive model: clean traces, and the same with single events deleted, delayed or
duplicated.

Every mutation that makes a stale or a missing mapping is found, with its pages and its events, and
none is invented.
"""

import random
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from naive_audit import PageWindow, naive_audit
from ramblock.trace.audit import Audit
from ramblock.trace.events import (
    Attributes,
    ConversionEnd,
    Discard,
    Event,
    Layout,
    Map,
    Source,
    Unmap,
)
from ramblock.trace.findings import Finding, FindingKind
from ramblock.units import PAGE_SIZE

PAGES = range(24)
TARGETS = ("iommu0", "iommu1")
SOURCE = Source("made", "ramblock")
WINDOWS = {FindingKind.STALE, FindingKind.MISSING}
#: Longer than any trace here: the end of a trace in the middle of a conversion is another test's.
GRACE = 10**12
#: Nanoseconds between two events; too many for the audit to join them.
APART = 2_000_000

Step = Callable[[int, int], Event]


class Writer:
    """Writes a trace as a VMM would that does everything right."""

    def __init__(self, *, attribute_first: bool) -> None:
        self.events: list[Event] = []
        self._attribute_first = attribute_first
        self._mapped: dict[str, set[int]] = {target: set() for target in TARGETS}

    def _add(self, kind: type, *fields: object) -> None:
        line = len(self.events) + 1
        self.events.append(kind(line * APART, SOURCE, line, *fields))

    def start(self) -> None:
        self._add(Layout, (), TARGETS, None, False, True)
        self._add(Attributes, 0, len(PAGES) * PAGE_SIZE, True)

    def convert(self, first: int, count: int, *, private: bool, by_page: bool) -> None:
        start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
        if not private or self._attribute_first:
            self._add(Attributes, start, end, private)
        for target in TARGETS:
            (self._unmap if private else self._map)(target, first, count, by_page=by_page)
        if private and not self._attribute_first:
            self._add(Attributes, start, end, private)
        if private:
            self._add(Discard, start, end, True)
        self._add(ConversionEnd, start, end, private)

    def _map(self, target: str, first: int, count: int, *, by_page: bool) -> None:
        missing = [p for p in range(first, first + count) if p not in self._mapped[target]]
        for start, size in pieces(missing, by_page=by_page):
            self._add(Map, target, start * PAGE_SIZE, (start + size) * PAGE_SIZE)
        self._mapped[target] |= set(missing)

    def _unmap(self, target: str, first: int, count: int, *, by_page: bool) -> None:
        there = [p for p in range(first, first + count) if p in self._mapped[target]]
        for start, size in pieces(there, by_page=by_page):
            begin = start * PAGE_SIZE
            self._add(Unmap, target, begin, begin + size * PAGE_SIZE, size * PAGE_SIZE)
        self._mapped[target] -= set(there)


def pieces(pages: Sequence[int], *, by_page: bool) -> list[tuple[int, int]]:
    """Runs of pages as (first, count)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and not by_page and sum(runs[-1]) == page:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


def a_clean_trace(seed: int, *, attribute_first: bool, conversions: int = 12) -> list[Event]:
    chance = random.Random(seed)
    writer = Writer(attribute_first=attribute_first)
    writer.start()
    for _ in range(conversions):
        first = chance.randrange(len(PAGES))
        count = min(chance.choice((1, 1, 2, 3, 8)), len(PAGES) - first)
        writer.convert(first, count, private=chance.random() < 0.5, by_page=chance.random() < 0.5)
    return writer.events


def audit(events: Sequence[Event]) -> list[Finding]:
    one = Audit(grace=GRACE)
    one.feed(events)
    result = one.finish()
    assert sum(count.count for count in result.counts.values()) == len(result.findings)
    return result.findings


def windows_of(findings: Sequence[Finding]) -> set[PageWindow]:
    return {
        PageWindow(
            finding.kind,
            str(finding.target),
            page,
            finding.opened.line,
            None if finding.closed is None else finding.closed.line,
        )
        for finding in findings
        # What a short unmap left is told whatever the pages' state; the model knows only states.
        if finding.kind in WINDOWS and not finding.note.startswith("an unmap came short")
        for page in range(finding.start // PAGE_SIZE, finding.end // PAGE_SIZE)
    }


def renumbered(events: Sequence[Event]) -> list[Event]:
    """The same in this order: lines and times that fit."""
    found = []
    for line, event in enumerate(events, start=1):
        copy = msgspec.structs.replace(event, line=line, time=line * APART)
        found.append(copy)
    return found


def mutations(events: list[Event]) -> list[list[Event]]:
    """
    Each event but the first two deleted, duplicated, and delayed by one, by three, and to the end.
    """
    found = []
    for index in range(2, len(events)):
        rest = events[:index] + events[index + 1 :]
        found.append(rest)
        found.append([*events[: index + 1], *events[index:]])
        for delay in (1, 3, len(events)):
            later = min(index + delay, len(rest))
            found.append([*rest[:later], events[index], *rest[later:]])
    return [renumbered(each) for each in found]


@pytest.mark.parametrize("attribute_first", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_single_mutations(seed: int, attribute_first: bool) -> None:
    clean = a_clean_trace(seed, attribute_first=attribute_first)
    assert {finding.kind for finding in audit(clean)} <= {FindingKind.TRANSITIONAL}
    assert naive_audit(clean, TARGETS, PAGES) == set()
    bad = 0
    for mutant in mutations(clean):
        expected = naive_audit(mutant, TARGETS, PAGES)
        bad += bool(expected)
        assert windows_of(audit(mutant)) == expected
    assert bad > 10


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_of_any_events(data: st.DataObject) -> None:
    page = st.integers(0, len(PAGES) - 1)

    def a_range() -> tuple[int, int]:
        first = data.draw(page)
        last = data.draw(st.integers(first, min(first + 6, len(PAGES) - 1)))
        return first * PAGE_SIZE, (last + 1) * PAGE_SIZE

    events: list[Event] = [Layout(APART, SOURCE, 1, (), TARGETS, ends=True)]
    for line in range(2, data.draw(st.integers(3, 40))):
        start, end = a_range()
        time = line * APART
        match data.draw(st.sampled_from("amue")):
            case "a":
                events.append(Attributes(time, SOURCE, line, start, end, data.draw(st.booleans())))
            case "m":
                target = data.draw(st.sampled_from(TARGETS))
                events.append(Map(time, SOURCE, line, target, start, end))
            case "u":
                target = data.draw(st.sampled_from(TARGETS))
                size = data.draw(st.sampled_from((end - start, PAGE_SIZE)))
                events.append(Unmap(time, SOURCE, line, target, start, end, size))
            case _:
                events.append(ConversionEnd(time, SOURCE, line, start, end, private=True))
    assert windows_of(audit(events)) == naive_audit(events, TARGETS, PAGES)
