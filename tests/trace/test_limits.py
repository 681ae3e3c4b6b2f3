"""Bounds of an audit, and what it says of a trace as evidence."""

import pytest

from made_trace import MS, PAGE, SOURCE, Made, kinds, mapped_and_shared, only, ranges
from ramblock.trace import guest_audit
from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Block,
    Conversion,
    ConversionEnd,
    Detach,
    Discard,
    Layout,
    Map,
    Origin,
    Plug,
    Remark,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.join import MapRun
from ramblock.trace.limits import Evidence, Names, find_limits, why_not_judged
from ramblock.trace.mappings import Mapping
from ramblock.trace.places import Places
from ramblock.trace.result import KEPT_OF_A_KIND, FindingLog, Lengths

# -- the rest is one finding


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_audit, "_MOST", 4)


def bytes_of(made: Made, kind: FindingKind) -> tuple[int, int, int, str]:
    """How many, where the last of them begins and ends, and what it says."""
    found = only(made.audit(), kind)
    last = found[-1]
    return len(found), last.start // PAGE, last.end // PAGE, last.note


@pytest.mark.usefixtures("few")
def test_stale_runs_behind_the_bound() -> None:
    """Of mappings under one state, and of states under one mapping."""
    made = Made()
    for page in range(0, 20, 2):
        made.at(page, Map, "t", page * PAGE, (page + 1) * PAGE)
    made.at(100, Attributes, 0, 30 * PAGE, True)
    again = made.also().at(500, Attributes, 0, 30 * PAGE, False)
    rest = "24,576 bytes of this range, in many parts"
    assert bytes_of(again, FindingKind.STALE) == (5, 8, 30, rest)
    made = Made()
    for page in range(0, 20, 2):
        made.at(page, Attributes, page * PAGE, (page + 1) * PAGE, True)
    made.at(100, Map, "t", 0, 30 * PAGE).at(500, Unmap, "t", 0, 30 * PAGE, 30 * PAGE)
    found = bytes_of(made, FindingKind.STALE)
    assert found == (5, 8, 30, f"mapped while private; {rest}")
    for count in (4, 5):
        made = Made()
        for page in range(0, 2 * count, 2):
            made.at(page, Map, "t", page * PAGE, (page + 1) * PAGE)
        made.at(100, Attributes, 0, 30 * PAGE, True).at(500, Attributes, 0, 30 * PAGE, False)
        assert "many parts" in bytes_of(made, FindingKind.STALE)[3] or count == 4


@pytest.mark.usefixtures("few")
def test_missing_runs_behind_the_bound() -> None:
    made = Made().at(0, Attach, "t")
    for page in range(1, 20, 2):
        made.at(page, Map, "t", page * PAGE, (page + 1) * PAGE)
    made.at(100, Attributes, 0, 20 * PAGE, False).at(500, Attributes, 0, 20 * PAGE, True)
    rest = "24,576 bytes of this range, in many parts"
    assert bytes_of(made, FindingKind.MISSING) == (5, 8, 20, rest)


def test_more_targets_than_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_audit, "_MOST_TARGETS", 2)
    made = Made()
    for name in "tuv":
        made.at(0, Attach, name)
    made.at(1, Attributes, 0, PAGE, False)
    result = made.also().at(2, Map, "v", 0, PAGE).at(100, Attributes, 0, PAGE, True).audit()
    assert any("more targets, or guests" in why for why in result.cannot_tell)
    assert {f.target for f in only(result, FindingKind.MISSING)} == {"t", "u"}
    made.events.pop(0)
    result = made.at(2, Map, "v", 0, PAGE).at(100, Attributes, 0, PAGE, True).audit()
    assert result.cannot_tell == []
    # Others that went before the end do not make it good; one that goes before makes room.
    made = Made().at(0, Attach, "t").at(0, Attach, "u").at(0, Attach, "v").at(1, Detach, "t")
    assert len(made.at(2, Attributes, 0, PAGE, True).at(3, Map, "u", 0, PAGE).audit().cannot_tell)
    made = Made().at(0, Attach, "t").at(0, Attach, "u").at(1, Detach, "t").at(2, Attach, "v")
    made.at(3, Attributes, 0, PAGE, True).at(4, Map, "v", 8 * PAGE, 9 * PAGE)
    assert made.audit().cannot_tell == []


# -- members of one name


def test_devices_of_one_name_each_map_everything() -> None:
    """vfio-user devices that QEMU's events do not tell apart, the second plugged in later."""
    made = mapped_and_shared().also()
    made.events.insert(0, Attach(0, SOURCE, 0, "t"))
    made.at(50, Attach, "t").at(51, Map, "t", 0, 16 * PAGE)
    made.at(100, Attributes, 0, 4 * PAGE, True)
    made.at(100.1, Unmap, "t", 0, 4 * PAGE)
    one_kept = made.also().at(500, VcpuEntry, "c").audit()
    assert ranges(one_kept, FindingKind.STALE) == [(0, 4)]
    assert any("t: several devices" in limit for limit in one_kept.limits)
    result = made.at(100.2, Unmap, "t", 0, 4 * PAGE).at(500, VcpuEntry, "c").audit()
    assert set(kinds(result)) == {FindingKind.TRANSITIONAL}
    # A third map of two devices is a double one.
    twice = made.at(501, Map, "t", 8 * PAGE, 9 * PAGE).audit()
    assert ranges(twice, FindingKind.DOUBLE_MAP) == [(8, 9)]


def test_a_device_that_joins_a_target_is_no_second_one() -> None:
    made = Made().at(0, Attach, "t").at(0, Attach, "t", "0000:01:00.0").at(0, Map, "t", 0, PAGE)
    made.at(1, Attach, "u", "0000:02:00.0").at(1, Attach, "u")
    result = made.at(2, Map, "t", 0, PAGE).audit()
    assert kinds(result) == [FindingKind.DOUBLE_MAP]
    assert not any("several devices" in limit for limit in result.limits)


# -- copies


def test_a_second_domains_copies_have_runs_of_another_length() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 8 * PAGE, False)
    for page in range(0, 8, 2):
        made.at(page + 1, Map, "t", page * PAGE, (page + 2) * PAGE, key=(100 + page) * PAGE)
    made.at(20, Map, "t", 0, 8 * PAGE, key=100 * PAGE)
    made.at(100, Attributes, 0, 8 * PAGE, True).at(101, Unmap, "t", 0, 8 * PAGE, 8 * PAGE)
    half = made.also().at(500, VcpuEntry, "c").audit()
    assert ranges(half, FindingKind.STALE) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert FindingKind.DOUBLE_MAP not in kinds(half)
    clean = made.at(102, Unmap, "t", 0, 8 * PAGE, 8 * PAGE).at(500, VcpuEntry, "c").audit()
    assert clean.failures() == 0
    assert FindingKind.UNMAP_OF_NOTHING not in kinds(clean)


def test_copies_beside_each_other_are_of_one_domain() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 9 * PAGE, False)
    for page in (0, 8, 4, 0, 4, 8, 8):
        made.at(len(made.events) * 3, Map, "t", page * PAGE, (page + 1) * PAGE, key=page * PAGE)
    for page, count in ((0, 2), (4, 2), (8, 3)):
        one_less = made.also()
        for number in range(count - 1):
            one_less.at(100 + number * 3, Unmap, "t", page * PAGE, (page + 1) * PAGE, PAGE)
        one_less.at(200, Attributes, 0, 9 * PAGE, True).at(500, VcpuEntry, "c")
        assert (page, page + 1) in ranges(one_less.audit(), FindingKind.STALE)
        one_less.events[-2:-2] = [Unmap(150 * MS, SOURCE, 0, "t", page * PAGE, (page + 1) * PAGE)]
        assert (page, page + 1) not in ranges(one_less.audit(), FindingKind.STALE)


@pytest.mark.parametrize("key", [None, 101 * PAGE])
def test_other_memory_at_the_same_place_is_a_double_map(key: int | None) -> None:
    made = Made().at(0, Map, "t", 0, 8 * PAGE, key=100 * PAGE).at(5, Map, "t", 0, PAGE, key=key)
    assert ranges(made.audit(), FindingKind.DOUBLE_MAP) == [(0, 1)]


# -- unmaps


def test_the_mapping_that_a_short_unmap_left() -> None:
    """The kernel unmaps upwards: over gaps, and in the middle of a mapping."""
    made = Made().at(0, Map, "t", 0, 2 * PAGE).at(2, Map, "t", 4 * PAGE, 8 * PAGE)
    result = made.at(4, Unmap, "t", 0, 8 * PAGE, 3 * PAGE).audit()
    (short,) = only(result, FindingKind.SHORT_UNMAP)
    assert (short.start, short.end) == (5 * PAGE, 8 * PAGE)
    assert short.note == f"{3 * PAGE} of {6 * PAGE} bytes were unmapped"
    assert short.mapped is not None
    assert short.mapped.line == 2
    assert ranges(result, FindingKind.STALE) == [(5, 8)]
    odd = Made().at(0, Map, "t", 0, PAGE).at(1, Unmap, "t", 0, PAGE, 1).audit()
    assert [f.start for f in only(odd, FindingKind.SHORT_UNMAP)] == [1]
    again = made.at(5, Unmap, "t", 5 * PAGE, 8 * PAGE, 3 * PAGE).audit()
    assert [f.open for f in only(again, FindingKind.STALE)] == [False]


def test_every_rule_has_a_call_that_unmaps_everything() -> None:
    for end, expected in (((1 << 64) - 1, 0), (1 << 64, 0), (1 << 63, 1)):
        made = Made().at(0, Map, "t", 0, 4 * PAGE).at(2, Map, "t", 8 * PAGE, 9 * PAGE)
        result = made.at(4, Unmap, "t", 0, end).audit(unmap="exact")
        assert len(only(result, FindingKind.INEXACT_UNMAP)) == expected
    for start, size in ((0, PAGE), (PAGE, PAGE), (3 * PAGE, PAGE)):
        made = Made().at(0, Map, "t", 0, 4 * PAGE).at(2, Unmap, "t", start, start + size)
        (finding,) = only(made.audit(unmap="whole"), FindingKind.BISECTING_UNMAP)
        assert (finding.start, finding.end) == (start, start + size)
        assert FindingKind.BISECTING_UNMAP in kinds(made.audit(unmap="exact"))
    made = Made().at(0, Layout, (), (), "whole").at(0, Map, "t", 0, 4 * PAGE)
    assert FindingKind.BISECTING_UNMAP in kinds(made.at(2, Unmap, "t", 0, PAGE).audit())
    assert kinds(made.audit(unmap="cut")) == []


def test_an_unmap_of_nothing_says_what_the_kernel_says() -> None:
    made = Made().at(0, Attach, "t").at(1, Unmap, "t", 0, 4 * PAGE, 2 * PAGE)
    (finding,) = made.audit().findings
    assert finding.note == "8192 bytes were unmapped that the trace does not show as mapped"
    made = Made().at(0, Attach, "t").at(1, Unmap, "t", 0, 4 * PAGE, done=False)
    assert made.audit().findings == []
    made = Made().at(1, Unmap, "t", 0, 4 * PAGE, 2 * PAGE)
    assert any(
        "8 KiB were unmapped that were mapped before" in each for each in made.audit().limits
    )


# -- what the trace is worth


def test_why_nothing_was_judged() -> None:
    def why(made: Made) -> list[str]:
        return made.audit().cannot_tell

    assert why(Made()) == ["no event was read"]
    assert why(Made().at(0, Attributes, 0, PAGE, True)) == ["no mappings are in this trace"]
    block = Block("ram", 0, 4 * PAGE, 0, True)
    made = Made().at(0, Layout, (block,)).at(1, StateChange, "ram", 0, PAGE, False)
    assert why(made) == ["no mappings are in this trace"]
    assert why(Made().at(0, VcpuEntry, "v")) == ["no mappings are in this trace"]
    (reason,) = why(Made().at(0, Map, "t", 0, PAGE))
    assert reason.startswith("no page states are in this trace")
    # A trace of a start and an end: nothing is left that could be stale.
    assert why(Made().at(0, Map, "t", 0, PAGE).at(1, Unmap, "t", 0, PAGE)) == []
    made = Made().at(0, StateChange, None, 0, PAGE, True).at(1, Map, "t", 0, PAGE)
    assert why(made) == ["the places of page states are not known (--layout)"]
    assert why(mapped_and_shared()) == []


def names(*each: str) -> Names:
    found = Names(5)
    for name in each:
        found.add(name)
    return found


def test_each_number_has_its_sentence() -> None:
    def about(**numbers: object) -> str:
        evidence = Evidence(**{"maps": 1, "unmaps": 1, "attributes": 1, **numbers})  # type: ignore[arg-type]
        return "\n".join(find_limits(evidence, [], timed=True))

    assert about() == ""
    for field, words in {
        "failed_maps": "maps that failed, 3 of them",
        "mapped_before": "3 B were unmapped that were mapped before",
        "guessed_ends": "the end of 3 conversions is not in the trace",
        "unfinished": "3 windows were open at the end of the trace",
        "stateless_bytes": "3 B were mapped of pages whose state",
        "unplaced_states": "3 state changes are relative",
        "unplaced_discards": "3 discards are of host addresses",
        "regions": "no maps are told",
    }.items():
        assert words in about(**{field: 3}), field
    assert about(unmaps=0).startswith("no unmap events")
    assert about(maps=0).startswith("no map events")
    assert about(attributes=0).startswith("no conversions or page attributes")
    for other in ("state_changes", "conversions"):
        assert about(attributes=0, **{other: 1}) == ""
    assert "an IOMMU of its own" in about(viommu=True)
    assert "and a conversion is taken for over" in "\n".join(
        find_limits(Evidence(), [], timed=False)
    )
    lost = [f"f:{number}: lost" for number in range(7)]
    assert about(lost=names(*lost[:5])).count("events were lost") == 5
    assert "more places" not in about(lost=names(*lost[:5], *lost[:5]))
    assert "and so at 2 more places" in about(lost=names(*lost))
    assert "a: everything" in about(emptied=names("b", "a"))
    assert why_not_judged(Evidence(events=1, maps=1), followed=True, left=True) == []
    assert why_not_judged(Evidence(events=1, viommu=True), followed=False, left=True) == []
    assert len(why_not_judged(Evidence(not_compared=True), followed=False, left=True)) == 2
    assert why_not_judged(Evidence(events=1, faults=1), followed=False, left=False) == []
    assert why_not_judged(Evidence(events=1, faults=1, attributes=1), followed=False, left=False)


def test_states_that_have_no_place_are_counted() -> None:
    block = Block("ram", 0, 4 * PAGE, 2 * PAGE, True)
    made = Made().at(0, Layout, (block,)).at(1, StateChange, "other", 0, PAGE, True)
    made.at(2, StateChange, "ram", 0, 2 * PAGE, True).at(3, Map, "t", 0, PAGE)
    made.at(4, StateChange, "ram", 2 * PAGE, 8 * PAGE, True).at(5, Map, "u", 0, 4 * PAGE)
    made.at(6, Discard, 0x1000, 0x2000, host=0x1000).at(7, Discard, 0x1000, 0x1000, host=0x1000)
    result = made.at(8, Discard, 0x1000, 0x2000, host=0x1000, done=False).audit()
    assert any(limit.startswith("2 state changes are relative") for limit in result.limits)
    assert any(limit.startswith("1 discards are of host") for limit in result.limits)
    assert any(
        limit.startswith("4 KiB were mapped of pages whose state") for limit in result.limits
    )


def test_judged_bytes() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 4 * PAGE, False)
    assert made.audit().judged_bytes == 0
    made.at(1, Map, "t", 0, 8 * PAGE)
    assert made.audit().judged_bytes == 4 * PAGE
    made.at(2, Attributes, 2 * PAGE, 16 * PAGE, True)
    assert made.audit().judged_bytes == 10 * PAGE
    made.at(3, Map, "u", 2 * PAGE, 3 * PAGE).at(4, Attributes, 0, 16 * PAGE, False)
    assert made.audit().judged_bytes == 19 * PAGE  # of the target that maps most
    made.at(5, Map, "t", 0, 2 * PAGE)  # a double one
    assert made.audit().judged_bytes == 19 * PAGE


def test_instants_and_transitions_have_their_lengths() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, 4 * PAGE, True)
    made.at(100, Unmap, "t", 0, PAGE, PAGE).at(100.2, Unmap, "t", PAGE, 4 * PAGE, 3 * PAGE)
    result = made.at(101, Remark, "lost", "12 events", lost=True).audit()
    assert kinds(result) == [FindingKind.TRANSITIONAL, FindingKind.INSTANT]
    assert (result.transitional.count, result.transitional.total) == (2, MS // 5)
    assert result.transitional.buckets == {1: 1, MS: 1}
    assert not any("windows were open" in limit for limit in result.limits)


def test_lengths_and_logs() -> None:
    lengths = Lengths()
    for length in (0, 1, 9, 10, 99, 100):
        lengths.add(length)
    assert lengths.buckets == {1: 1, 10: 2, 100: 2, 1000: 1}
    assert (lengths.count, lengths.total, lengths.longest) == (6, 219, 100)
    log = FindingLog()
    for start in range(3):
        log.add(
            Finding(
                kind=FindingKind.STALE,
                target="t",
                start=start * PAGE,
                end=9 * PAGE,
                since=5,
                until=None if start == 2 else 8 + start,
                opened=Origin("f", 1),
                open=start == 2,
            )
        )
    count = log.counts[FindingKind.STALE]
    assert (count.count, count.open, count.size, count.longest) == (3, 1, 24 * PAGE, 4)
    assert [finding.start // PAGE for finding in log.worst()] == [2, 1, 0]
    assert log.keeps(FindingKind.STALE, 0)
    log.count(FindingKind.STALE, 7)
    assert (count.count, count.size) == (4, 24 * PAGE + 7)


def test_what_is_left_is_summed_up() -> None:
    """Mappings, of which a hole makes two pieces, and runs by their calls."""
    made = Made().at(0, Map, "t", 0, 4 * PAGE).at(5, Map, "t", 8 * PAGE, 9 * PAGE)
    made.at(10, Unmap, "t", PAGE, 2 * PAGE, PAGE)
    for page in range(16, 20):
        made.at(20 + page / 1000, Map, "t", page * PAGE, (page + 1) * PAGE)
    made.at(30, Unmap, "t", 17 * PAGE, 18 * PAGE, PAGE)
    (target,) = made.audit().targets
    assert (target.maps, target.unmaps, target.mapped_bytes) == (6, 2, 7 * PAGE)
    assert target.entries == 2 + 3
    (gone,) = made.at(40, Detach, "t").audit().targets
    assert gone == target


def test_a_stale_remark_brings_back_what_seemed_to_be_gone() -> None:
    made = Made().at(0, Attach, "t").at(1, Map, "t", 2 * PAGE, 4 * PAGE)
    made.at(2, Unmap, "t", 2 * PAGE, 4 * PAGE).at(3, Map, "t", 3 * PAGE, 4 * PAGE)
    made.at(4, Remark, "stale", "was refused", "t", PAGE, 4 * PAGE, True)
    result = made.at(9, Remark, "stale", "empty", "t", PAGE, PAGE, True).audit()
    found = only(result, FindingKind.STALE)
    assert [(f.start // PAGE, f.end // PAGE, f.since, f.note) for f in found] == [
        (1, 3, 4 * MS, "was refused"),
        (3, 4, 4 * MS, "was refused"),
    ]
    assert [f.mapped.line for f in found if f.mapped] == [5, 4]
    assert result.targets[0].mapped_bytes == 3 * PAGE
    own = Made(source=Source("p", "ramblock")).at(0, Remark, "order", "wrong", "t", 0, PAGE)
    own.at(1, Remark, "order", "", None).at(2, Remark, "rule", "text", "t", PAGE)
    found = only(own.audit(), FindingKind.BROKEN_RULE)
    assert [(f.start, f.end, f.note) for f in found] == [
        (0, 0, "order"),
        (0, PAGE, "order: wrong"),
        (PAGE, PAGE, "rule: text"),
    ]


class Seen:
    """An observer."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        self.calls.append(("state", time, start // PAGE, end // PAGE, private))

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        self.calls.append(("mapped", time, target, start // PAGE, end // PAGE))

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        self.calls.append(("unmapped", time, target, start // PAGE, end // PAGE))

    def converted(self, event: ConversionEnd) -> None:
        self.calls.append(("converted", event.line))

    def accessed(self, event: Access) -> None:
        self.calls.append(("accessed", event.line))

    def found(self, finding: Finding) -> None:
        self.calls.append(("found", finding.kind, finding.start // PAGE, finding.end // PAGE))


def test_an_observer_sees_everything() -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, False).at(1, Map, "t", 0, 4 * PAGE)
    made.at(2, Attributes, 0, PAGE, True).at(3, Unmap, "t", 0, PAGE, PAGE)
    made.at(4, ConversionEnd, 0, PAGE, True).at(5, Access, "t", 0, 64, True, True)
    made.at(6, Unmap, "t", PAGE, 2 * PAGE, 0, done=False).at(7, Detach, "t")
    seen = Seen()
    result = made.audit(observer=seen)
    assert seen.calls == [
        ("state", 0, 0, 4, False),
        ("mapped", MS, "t", 0, 4),
        ("state", 2 * MS, 0, 1, True),
        ("unmapped", 3 * MS, "t", 0, 1),
        ("found", FindingKind.TRANSITIONAL, 0, 1),
        ("converted", 5),
        ("accessed", 6),
        ("found", FindingKind.STALE, 1, 2),
        ("unmapped", 7 * MS, "t", 1, 4),
        ("found", FindingKind.FAULT, 0, 1),
    ]
    assert [finding.kind for finding in result.findings] == [
        FindingKind.STALE,
        FindingKind.FAULT,
        FindingKind.TRANSITIONAL,
    ]


def test_host_addresses_of_maps_place_a_discard() -> None:
    """The newest place of a host address counts."""
    host = 0x7F0000000000
    made = Made().at(0, Map, "t", 0, 4 * PAGE, host=host)
    made.at(3, Map, "t", 8 * PAGE, 9 * PAGE, host=host + 2 * PAGE)
    made.at(6, Map, "u", 0, PAGE, host=host)  # as it is known
    made.at(9, Discard, host, host + 4 * PAGE, host=host)
    found = ranges(made.at(500, VcpuEntry, "c").audit(), FindingKind.FREED)
    assert found == [(0, 1), (0, 2), (3, 4), (8, 9)]


def test_a_target_that_goes_has_missed_what_it_did_not_map() -> None:
    made = Made().at(0, Attach, "t").at(1, Attributes, 4 * PAGE, 8 * PAGE, False)
    made.at(2, Map, "t", 4 * PAGE, 6 * PAGE).at(100, Detach, "t").at(200, Attach, "t")
    result = made.at(500, Attributes, 0, 16 * PAGE, True).audit()
    assert ranges(result, FindingKind.MISSING) == [(6, 8)]
    assert FindingKind.DOUBLE_MAP not in kinds(made.at(600, Map, "t", 4 * PAGE, 6 * PAGE).audit())


def test_events_of_nothing() -> None:
    """Of no bytes, as broken traces have them: nothing happens, and nothing breaks."""
    made = Made().at(0, Layout, (Block("ram", PAGE, PAGE, 0, True, 1 << 40),), ("t",))
    made.at(1, Plug, 0, 0, True).at(1, Plug, 0, 0, False).at(1, Discard, 0, 0)
    made.at(2, Attributes, 0, PAGE, False).at(3, Attributes, 9 * PAGE, PAGE, True)
    made.at(4, Map, "t", PAGE, PAGE).at(5, Map, "t", PAGE, PAGE, done=False)
    made.at(6, Unmap, "t", PAGE, PAGE, PAGE).at(7, StateChange, "ram", 0, PAGE, True)
    made.at(8, Conversion, PAGE, PAGE, True).at(9, ConversionEnd, PAGE, PAGE, True)
    result = made.at(500, Attributes, 0, PAGE, True).audit()
    assert ranges(result, FindingKind.MISSING) == [(0, 1)]
    assert len(result.findings) == 1
    (target,) = result.targets
    assert (target.maps, target.unmaps, target.mapped_bytes) == (0, 1, 0)


# -- what is kept


def test_the_longest_of_many_transitional_windows_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ramblock.trace.result.KEPT_OF_A_KIND", 3)
    made = Made().at(0, Attributes, 0, PAGE, False)
    lengths = [1, 5, 2, 7, 3, 6, 4, 8, 1]
    for number, length in enumerate(lengths):
        now = 100 * (number + 1)
        made.at(now, Map, "t", 0, PAGE).at(now + 10, Attributes, 0, PAGE, True)
        made.at(now + 10 + length, Unmap, "t", 0, PAGE, PAGE)
        made.at(now + 50, Attributes, 0, PAGE, False)
    result = made.audit(grace=30 * MS)
    kept = [f for f in result.findings if f.kind is FindingKind.TRANSITIONAL]
    assert [f.duration for f in kept] == [8 * MS, 7 * MS, 6 * MS]
    count = result.counts[FindingKind.TRANSITIONAL]
    assert (count.count, count.size, count.longest) == (9, 9 * PAGE, 8 * MS)


def test_a_log_keeps_twice_as_many_as_it_lists_at_most() -> None:
    log = FindingLog()
    for number in range(5 * KEPT_OF_A_KIND // 2):
        log.add(
            Finding(
                kind=FindingKind.STALE,
                target="t",
                start=number * PAGE,
                end=(number + 1) * PAGE,
                since=0,
                until=number,
                opened=Origin("f", number),
            )
        )
        if number % KEPT_OF_A_KIND == 0:
            assert len(log._kept[FindingKind.STALE]) <= 2 * KEPT_OF_A_KIND
    assert len(log._kept[FindingKind.STALE]) < 2 * KEPT_OF_A_KIND
    assert len(log.worst()) == KEPT_OF_A_KIND
    assert log.counts[FindingKind.STALE].count == 5 * KEPT_OF_A_KIND // 2


def test_no_more_blocks_are_placed_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramblock.trace.places._MOST", 2)
    places = Places()
    for number in range(3):
        places.place(Block(f"b{number}", number * PAGE, (number + 1) * PAGE))
    assert [bool(places.of_block(f"b{number}", 0, PAGE)) for number in range(3)] == [
        True,
        True,
        False,
    ]
    for number in range(3, 6):
        places.place(Block("b0", number * PAGE, (number + 1) * PAGE))
    (found,) = places.of_block("b0", 0, PAGE)
    assert len(found) == 2
    places.place(Block("empty", 5 * PAGE, 5 * PAGE))
    assert places.around(5 * PAGE, 5 * PAGE + 1) == (5 * PAGE, 5 * PAGE + 1)


def test_places_of_another_source() -> None:
    one, other = Source("a.log", "qemu"), Source("b.log", "qemu")
    places = Places()
    assert not places.is_told_by_another(one)
    places.place(Block("by hand", 0, PAGE))
    assert not places.is_told_by_another(one)
    told = Places()
    told.place(Block("slot 0", 0, PAGE, host=1), one)
    assert told.is_told_by_another(other)
    assert not told.is_told_by_another(one)
    told.place(Block("slot 1", PAGE, 2 * PAGE, host=9), other)
    assert not told.is_told_by_another(other)


def test_the_line_of_each_call_of_a_run() -> None:
    run = MapRun(0, SOURCE, 10, "t", 0, 4 * PAGE, count=4, step=3, until=0)
    mapping = Mapping.of(run, 1, 0)
    assert [mapping.origin(page * PAGE).line for page in range(4)] == [10, 13, 16, 19]
