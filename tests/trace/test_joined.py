"""Maps and unmaps that continue each other are one event: the audit finds the same."""

import itertools
import random
from collections.abc import Iterable

import pytest

from made_trace import MS, PAGE, SOURCE, Made, only
from ramblock.trace import join
from ramblock.trace.audit import Audit
from ramblock.trace.events import (
    Attach,
    Attributes,
    ConversionEnd,
    Discard,
    Event,
    Layout,
    Map,
    Plug,
    Source,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.findings import FindingKind
from ramblock.trace.join import Joiner, MapRun, UnmapRun
from ramblock.trace.result import AuditResult


def joined(events: Iterable[Event], *, unmaps: bool = True) -> list[Event]:
    joiner = Joiner(unmaps=unmaps)
    return [*joiner.feed(events), *joiner.finish()]


def calls(kind: type, count: int = 4, **more: object) -> list[Event]:
    """So many calls of a page, 3 lines and 1 µs apart."""
    found = []
    for number in range(count):
        start = (10 + number) * PAGE
        at = number * 1000, SOURCE, 5 + 3 * number, "t", start, start + PAGE
        found.append(kind(*at, **more))
    return found


def test_a_run_is_one_event() -> None:
    (run,) = joined(calls(Map))
    assert isinstance(run, MapRun)
    assert (run.start, run.end, run.count) == (10 * PAGE, 14 * PAGE, 4)
    assert (run.line, run.step, run.time, run.until) == (5, 3, 0, 3000)
    (run,) = joined(calls(Unmap, unmapped=PAGE))
    assert isinstance(run, UnmapRun)
    assert (run.start, run.end, run.count, run.unmapped) == (10 * PAGE, 14 * PAGE, 4, 4 * PAGE)
    assert (run.line, run.step, run.time, run.until) == (5, 3, 0, 3000)
    (run,) = joined(calls(Unmap))
    assert isinstance(run, UnmapRun)
    assert run.unmapped is None
    assert len(joined(calls(Unmap), unmaps=False)) == 4
    assert len(joined(calls(Map), unmaps=False)) == 1


def test_physical_and_host_addresses_go_along() -> None:
    events = calls(Map)
    for event, other in itertools.product(events, (0, 1)):
        assert isinstance(event, Map)
        event.key, event.host = event.start + 7 * PAGE, event.start * (1 + other * 0) + PAGE
    (run,) = joined(events)
    assert isinstance(run, MapRun)
    assert (run.key, run.host) == (17 * PAGE, 11 * PAGE)


@pytest.mark.parametrize("field", ["key", "host"])
def test_maps_of_other_memory_do_not_join(field: str) -> None:
    events = calls(Map)
    for event in events:
        assert isinstance(event, Map)
        event.key, event.host = event.start + 7 * PAGE, event.start
    setattr(events[2], field, 99 * PAGE)
    assert [(run.start, run.end) for run in joined(events)] == [  # type: ignore[union-attr]
        (10 * PAGE, 12 * PAGE),
        (12 * PAGE, 13 * PAGE),
        (13 * PAGE, 14 * PAGE),
    ]


CHANGES: list[tuple[type, str, object]] = [
    (Map, "line", 15),
    (Map, "time", 2_000_000_000),
    (Map, "time", -5),
    (Map, "time", None),
    (Map, "target", "u"),
    (Map, "source", Source("other", "made")),
    (Map, "done", False),
    (Map, "start", 12 * PAGE + 1),
    (Map, "end", 14 * PAGE),
    (Map, "key", 5),
    (Map, "host", 5),
    (Unmap, "line", 15),
    (Unmap, "target", "u"),
    (Unmap, "done", False),
    (Unmap, "unmapped", PAGE),
    (Unmap, "end", 14 * PAGE),
]


@pytest.mark.parametrize(("kind", "field", "value"), CHANGES)
@pytest.mark.parametrize("at", [1, 2])
def test_what_is_different_does_not_join(kind: type, field: str, value: object, at: int) -> None:
    events = calls(kind)
    setattr(events[at], field, value)
    if field == "line":
        events[at].line += at - 2
        if at == 1:
            events[at].line = events[0].line - 1  # before it
    parts = joined(events)
    assert [(event.start, event.end) for event in parts] != [(10 * PAGE, 14 * PAGE)]  # type: ignore[union-attr]
    before = parts[0]
    assert isinstance(before, Map | Unmap)
    assert before.end == (10 + at) * PAGE


def test_an_unmap_that_came_short_does_not_join() -> None:
    for at in (0, 1, 3):
        events = calls(Unmap, unmapped=PAGE)
        assert isinstance(events[at], Unmap)
        events[at].unmapped = 0  # type: ignore[union-attr]
        assert 1 < len(joined(events)) <= 3


def test_lines_and_times_that_are_too_far_apart() -> None:
    for lines, time, count in (
        (16, MS, 1),
        (17, MS, 2),
        (16, MS + 1, 2),
        (0, MS, 1),
        (-1, MS, 2),
        (1, -1, 2),
    ):
        one = Map(5, SOURCE, 1, "t", 0, PAGE)
        two = Map(5 + time, SOURCE, 1 + lines, "t", PAGE, 2 * PAGE)
        assert len(joined([one, two])) == count


def test_a_line_that_tells_several_calls_is_the_line_of_each() -> None:
    events = calls(Map)
    for event, line in zip(events, (5, 5, 5, 8), strict=True):
        event.line = line
    run, other = joined(events)
    assert isinstance(run, MapRun)
    assert (run.count, run.step, other.line) == (3, 0, 8)


def test_any_other_event_stands_between() -> None:
    events = calls(Map)
    events.insert(2, VcpuEntry(1500, SOURCE, 9, "v"))
    assert [type(event) for event in joined(events)] == [MapRun, VcpuEntry, MapRun]
    mixed = [*calls(Map, 2), *calls(Unmap, 2)]
    assert [type(event) for event in joined(mixed)] == [MapRun, UnmapRun]
    empty = [Map(0, SOURCE, line, "t", PAGE, PAGE) for line in (1, 2)]
    assert len(joined(empty)) == 2


def test_the_line_of_each_call_is_told() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 8 * PAGE, False)
    for page in range(8):
        made.at(1 + page / 1000, Map, "t", page * PAGE, (page + 1) * PAGE)
    made.at(100, Attributes, 5 * PAGE, 6 * PAGE, True).at(500, VcpuEntry, "c")
    (finding,) = only(made.audit(), FindingKind.STALE)
    assert finding.mapped is not None
    assert finding.mapped.line == 3 + 5


def test_a_run_counts_as_so_many_calls_and_ends_at_its_last() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 8 * PAGE, True)
    for page in range(8):
        made.at(1 + page / 10, Map, "t", page * PAGE, (page + 1) * PAGE)
    for page in range(6):
        made.at(2 + page / 10, Unmap, "t", page * PAGE, (page + 1) * PAGE)
    result = made.audit()
    (target,) = result.targets
    assert (target.maps, target.unmaps, target.entries) == (8, 6, 2)
    assert (result.events, result.ended) == (16, round(2.5 * MS))
    assert any("6 unmaps were taken as done" in limit for limit in result.limits)
    assert not any("did not name one mapping" in limit for limit in result.limits)


# -- the same findings


def pages_of(result: AuditResult) -> dict[tuple[FindingKind, str | None], list[int]]:
    """Of each kind and target the pages, as often as they are found."""
    found: dict[tuple[FindingKind, str | None], list[int]] = {}
    for each in result.findings:
        pages = found.setdefault((each.kind, each.target), [])
        pages += range(each.start // PAGE, each.end // PAGE)
    return {kind: sorted(pages) for kind, pages in found.items()}


def limits_of(result: AuditResult) -> list[str]:
    """Those that do not count windows, of which a run has one."""
    return [limit for limit in result.limits if "windows were open" not in limit]


def trace_with_runs(seed: int) -> list[Event]:
    chance = random.Random(seed)
    events: list[Event] = [Layout(0, SOURCE, 1, (), ("t", "u"), ends=True)]

    def add(kind: type, *fields: object, apart: int = 3 * MS, **more: object) -> None:
        last = events[-1]
        assert last.time is not None
        events.append(kind(last.time + apart, SOURCE, last.line + 1, *fields, **more))

    for _ in range(chance.randrange(5, 30)):
        first, count = chance.randrange(24), chance.choice((1, 2, 4, 8))
        start, end = first * PAGE, (first + count) * PAGE
        target = chance.choice("tu")
        match chance.choice("aammmmuuuedp"):
            case "a":
                add(Attributes, start, end, chance.random() < 0.5)
            case "m":
                base = chance.choice((None, None, 0, 1 << 30))
                for page in range(start, end, PAGE):
                    key = None if base is None else base + page
                    add(Map, target, page, page + PAGE, key=key, apart=1000)
            case "u":
                told = chance.random() < 0.5
                for page in range(start, end, PAGE):
                    add(Unmap, target, page, page + PAGE, PAGE if told else None, apart=1000)
            case "e":
                add(ConversionEnd, start, end, True)
            case "d":
                add(Discard, start, end)
            case _:
                add(Plug, start, end, chance.random() < 0.5)
    return events


@pytest.mark.parametrize("unmap", [None, "cut", "whole", "exact"])
def test_joined_or_not_in_any_chunking_the_findings_are_the_same(
    unmap: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    for seed in range(120):
        events = trace_with_runs(seed)
        runs += sum(isinstance(event, MapRun | UnmapRun) for event in joined(events))
        results = []
        for size in (1, 3, len(events)):
            audit = Audit(grace=10**12, unmap=unmap)
            for first in range(0, len(events), size):
                audit.feed(events[first : first + size])
            results.append(audit.finish())
        with monkeypatch.context() as patch:
            patch.setattr(join, "_continues", lambda *_: False)
            audit = Audit(grace=10**12, unmap=unmap)
            audit.feed(events)
            alone = audit.finish()
        for result in results:
            assert pages_of(result) == pages_of(alone), seed
            assert {kind: count.size for kind, count in result.counts.items()} == {
                kind: count.size for kind, count in alone.counts.items()
            }
            assert result.events == alone.events == len(events)
            assert result.judged_bytes == alone.judged_bytes
            assert limits_of(result) == limits_of(alone)
            assert [(t.maps, t.unmaps, t.mapped_bytes, t.entries) for t in result.targets] == [
                (t.maps, t.unmaps, t.mapped_bytes, t.entries) for t in alone.targets
            ]
    assert runs > 100
