"""
The audit against a naive model: clean traces, and the same with single events deleted, delayed or
duplicated.

Every mutation that makes a stale or a missing mapping is found, with its pages and its events, and
none is invented. So are the windows of events in any order.
"""

import random
from collections.abc import Callable, Sequence

import msgspec
import pytest

from naive_audit import PageWindow, naive_audit
from ramblock.trace.audit import Audit
from ramblock.trace.events import (
    Attributes,
    ConversionEnd,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Source,
    Unmap,
)
from ramblock.trace.findings import Finding, FindingKind
from ramblock.units import PAGE_SIZE

PAGES = range(24)
TARGETS = ("iommu0", "iommu1")
SOURCE = Source("made", "ramblock")
WINDOWS = {
    FindingKind.STALE,
    FindingKind.MISSING,
    FindingKind.UNPLUGGED,
    FindingKind.FREED,
}
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
    assert all(finding.start < finding.end for finding in result.findings)
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
        if finding.kind in WINDOWS
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


def any_events(seed: int, kinds: str) -> list[Event]:
    """Events in any order, each kind by its letter."""
    chance = random.Random(seed)
    events: list[Event] = [Layout(APART, SOURCE, 1, (), TARGETS, ends=True)]
    for line in range(2, chance.randrange(4, 40)):
        first = chance.randrange(len(PAGES))
        last = chance.randint(first, min(first + 6, len(PAGES) - 1))
        start, end = first * PAGE_SIZE, (last + 1) * PAGE_SIZE
        at = line * APART, SOURCE, line
        target, yes, done = chance.choice(TARGETS), chance.random() < 0.5, chance.random() < 0.8
        size = chance.choice((None, end - start, end - start, 2 * PAGE_SIZE, PAGE_SIZE, 0))
        # Of two domains: the same physical addresses at the same place, or others.
        key = start + chance.choice((0, 1 << 30))
        match chance.choice(kinds):
            case "a":
                event: Event = Attributes(*at, start, end, yes)
            case "m":
                event = Map(*at, target, start, end)
            case "c":
                event = Map(*at, target, start, end, key=key)
            case "f":
                event = Map(*at, target, start, end, done=False)
            case "u":
                event = Unmap(*at, target, start, end, size)
            case "r":
                event = Unmap(*at, target, start, end, done=False)
            case "d":
                event = Discard(*at, start, end, size is not None, done=done)
            case "q":
                event = PlugRequest(*at, start, end, yes)
            case "p":
                event = Plug(*at, start, end, yes, done)
            case _:
                event = ConversionEnd(*at, start, end, private=True)
        events.append(event)
    return events


def differs(events: Sequence[Event]) -> bool:
    return windows_of(audit(events)) != naive_audit(events, TARGETS, PAGES)


def smallest(events: list[Event]) -> list[Event]:
    """Drop what is not needed for a difference."""
    for index in range(len(events) - 1, 0, -1):
        rest = events[:index] + events[index + 1 :]
        if differs(rest):
            events = rest
    return events


@pytest.mark.parametrize(
    "kinds",
    ["amue", "aamcuue", "amurre", "amuddee", "aamuqppee", "aammcffuurddqppee"],
    ids=["states", "copies", "refused", "freed", "plugged", "all"],
)
def test_any_order_of_any_events(kinds: str) -> None:
    for seed in range(200):
        events = any_events(seed, kinds)
        if differs(events):
            events = smallest(events)
            assert windows_of(audit(events)) == naive_audit(events, TARGETS, PAGES), events
