"""The audit, one situation after the other."""

from collections.abc import Sequence

import pytest

from made_trace import MS, PAGE, SOURCE, Made, kinds, mapped_and_shared
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
    Plug,
    PlugRequest,
    Remark,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.findings import FindingKind
from ramblock.trace.result import AuditResult


def test_the_order_of_qemu_is_transitional() -> None:
    made = mapped_and_shared()
    made.at(100, Attributes, 0, 4 * PAGE, True).at(100.5, Unmap, "t", 0, 4 * PAGE, 4 * PAGE)
    result = made.at(200, Access, "t", 0, 64, False, False).audit()
    assert kinds(result) == [FindingKind.TRANSITIONAL]
    assert (result.transitional.count, result.transitional.longest) == (1, MS // 2)
    assert result.failures() == 0
    assert result.failures(strict=True) == 1


def test_unmap_first_finds_nothing() -> None:
    made = mapped_and_shared()
    made.at(100, Unmap, "t", 0, 4 * PAGE, 4 * PAGE).at(101, Attributes, 0, 4 * PAGE, True)
    result = made.at(200, Access, "t", 0, 64, False, False).audit()
    assert kinds(result) == []
    assert (result.not_yet_mapped.count, result.not_yet_mapped.longest) == (1, MS)


def test_an_unmap_that_comes_too_late_is_stale() -> None:
    made = mapped_and_shared()
    made.at(100, Attributes, 4 * PAGE, 8 * PAGE, True)
    result = made.at(120, Unmap, "t", 0, 16 * PAGE, 16 * PAGE).audit()
    (finding,) = [f for f in result.findings if f.kind is FindingKind.STALE]
    assert (finding.start, finding.end, finding.target) == (4 * PAGE, 8 * PAGE, "t")
    assert (finding.since, finding.until, finding.duration) == (100 * MS, 120 * MS, 20 * MS)
    assert (finding.opened.line, finding.mapped and finding.mapped.line) == (3, 2)
    assert finding.closed is not None
    assert finding.closed.line == 4


def test_an_unmap_that_never_comes_is_stale_to_the_end() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, PAGE, True)
    result = made.at(120, Access, "t", 0, 64, False, False).audit()
    (finding,) = result.findings
    assert (finding.kind, finding.open, finding.until) == (FindingKind.STALE, True, None)
    assert result.counts[FindingKind.STALE].open == 1


def test_a_trace_that_ends_in_a_conversion_accuses_nobody() -> None:
    result = mapped_and_shared().at(100, Attributes, 0, PAGE, True).audit()
    assert kinds(result) == []
    assert any("were open at the end" in limit for limit in result.limits)


def test_a_conversion_goes_on_as_long_as_its_steps_come() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, 16 * PAGE, True)
    for page in range(16):
        made.at(105 + 5 * page, Unmap, "t", page * PAGE, (page + 1) * PAGE, PAGE)
    result = made.at(500, Access, "t", 0, 64, False, False).audit()
    assert set(kinds(result)) == {FindingKind.TRANSITIONAL}
    assert result.transitional.longest == 80 * MS


def test_the_next_entry_of_the_vcpu_ends_its_conversion() -> None:
    made = mapped_and_shared().at(50, VcpuEntry, "v1").at(60, VcpuEntry, "v2")
    made.at(100, Conversion, 0, PAGE, True, "v1").at(101, Attributes, 0, PAGE, True, "v1")
    made.at(102, VcpuEntry, "v2")  # not ours
    early = Made()
    early.events = [*made.events]
    early.at(103, Unmap, "t", 0, PAGE, PAGE).at(104, VcpuEntry, "v1")
    assert kinds(early.audit()) == [FindingKind.TRANSITIONAL]
    made.at(103, VcpuEntry, "v1").at(104, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(made.audit()) == [FindingKind.STALE]


def test_where_entries_are_traced_a_long_conversion_is_not_over_before() -> None:
    made = mapped_and_shared().at(50, VcpuEntry, "v1")
    made.at(100, Conversion, 0, PAGE, True, "v1").at(101, Attributes, 0, PAGE, True, "v1")
    made.at(900, Unmap, "t", 0, PAGE, PAGE).at(901, VcpuEntry, "v1")
    assert kinds(made.audit()) == [FindingKind.TRANSITIONAL]


def test_a_shared_page_that_is_never_mapped_is_missing() -> None:
    made = mapped_and_shared().at(100, Attributes, 16 * PAGE, 20 * PAGE, False)
    made.at(101, Map, "t", 16 * PAGE, 18 * PAGE)
    result = made.at(200, Attributes, 16 * PAGE, 20 * PAGE, True).audit()
    (finding,) = [f for f in result.findings if f.kind is FindingKind.MISSING]
    assert (finding.start, finding.end, finding.duration) == (18 * PAGE, 20 * PAGE, 100 * MS)


def test_nothing_is_missing_where_there_is_no_target() -> None:
    made = Made().at(0, Attributes, 0, PAGE, False).at(100, Attributes, PAGE, 2 * PAGE, True)
    result = made.audit()
    assert kinds(result) == []
    assert any("no map events" in limit for limit in result.limits)


def test_a_private_page_that_is_mapped_has_no_excuse() -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, True).at(1, Map, "t", PAGE, 2 * PAGE)
    result = made.at(1.001, Attributes, PAGE, 2 * PAGE, False).audit()
    (finding,) = result.findings
    assert (finding.kind, finding.note) == (FindingKind.STALE, "mapped while private")


def test_a_window_of_no_length_is_apart() -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, True).at(1, Map, "t", PAGE, 2 * PAGE)
    result = made.at(1, Unmap, "t", PAGE, 2 * PAGE, PAGE).audit()
    assert kinds(result) == [FindingKind.INSTANT]
    assert result.failures() == 0


def test_without_times_a_conversion_lasts_until_the_next() -> None:
    def trace(*, late: bool) -> AuditResult:
        made = Made().at(None, Attributes, 0, 16 * PAGE, False).at(None, Map, "t", 0, 16 * PAGE)
        made.at(None, Conversion, 0, PAGE, True).at(None, Attributes, 0, PAGE, True)
        if late:
            made.at(None, Conversion, PAGE, 2 * PAGE, True)
        made.at(None, Unmap, "t", 0, PAGE, PAGE)
        return made.audit()

    assert kinds(trace(late=False)) == [FindingKind.TRANSITIONAL]
    late = trace(late=True)
    assert kinds(late) == [FindingKind.STALE]
    assert late.findings[0].since is None
    assert any("no times" in limit for limit in late.limits)


def test_memory_freed_while_mapped() -> None:
    """What its own unmap follows is a step of a VMM: virtio-mem gives back first."""
    made = mapped_and_shared().at(5, Discard, 2 * PAGE, 40 * PAGE)
    assert kinds(made.audit()) == []  # it may still be unmapped
    later = Made()
    later.events = [*made.events]
    later.at(5.01, Unmap, "t", 0, 16 * PAGE, 16 * PAGE)
    assert kinds(later.at(300, VcpuEntry, "c").audit()) == [FindingKind.TRANSITIONAL]
    (finding,) = made.at(300, VcpuEntry, "c").audit().findings
    assert (finding.kind, finding.start, finding.end) == (FindingKind.FREED, 2 * PAGE, 16 * PAGE)


def test_a_discard_of_host_addresses_needs_their_place() -> None:
    made = mapped_and_shared().at(5, Discard, 0x7F0000000000, 0x7F0000001000, host=0x7F0000000000)
    result = made.audit()
    assert kinds(result) == []
    assert any("host addresses" in limit for limit in result.limits)
    block = Block(name="ram", start=0, end=16 * PAGE, host=0x7EFFFFFFF000)
    made.events.insert(0, Layout(0, SOURCE, 0, (block,)))
    (finding,) = made.at(300, VcpuEntry, "c").audit().findings
    assert (finding.kind, finding.start, finding.end) == (FindingKind.FREED, PAGE, 2 * PAGE)


def test_the_private_side_may_be_freed() -> None:
    assert kinds(mapped_and_shared().at(5, Discard, 0, PAGE, shared=False).audit()) == []


def test_a_short_unmap_leaves_the_rest() -> None:
    made = mapped_and_shared().at(100, Unmap, "t", 0, 16 * PAGE, 10 * PAGE)
    made.at(101, Attributes, 0, 16 * PAGE, True)
    result = made.at(300, Detach, "t").audit()
    found = {f.kind: (f.start, f.end) for f in result.findings}
    rest = (10 * PAGE, 16 * PAGE)
    assert found == {FindingKind.SHORT_UNMAP: rest, FindingKind.STALE: rest}


def test_an_unmap_that_failed_leaves_everything() -> None:
    made = mapped_and_shared().at(100, Unmap, "t", 0, 4 * PAGE, done=False)
    (finding,) = made.at(300, Unmap, "t", 0, 16 * PAGE, 16 * PAGE).audit().findings
    assert (finding.kind, finding.start, finding.end) == (FindingKind.STALE, 0, 4 * PAGE)
    assert finding.note == "the unmap failed"


def test_a_map_that_failed_maps_nothing() -> None:
    made = Made().at(0, Attributes, 0, PAGE, True).at(1, Map, "t", 0, PAGE, done=False)
    assert kinds(made.audit()) == []


def test_what_domains_of_one_container_share_is_no_double_map() -> None:
    """
    Type1 maps everything for each domain, and unmaps it for each: the page is mapped until the
    last.
    """
    made = Made().at(0, Attributes, 0, 4 * PAGE, False)
    for _ in range(2):
        made.at(1, Map, "t", 0, 2 * PAGE, key=0x1000).at(
            1, Map, "t", 2 * PAGE, 4 * PAGE, key=0x9000
        )
    # The other domains lose it in one call, the first piece by piece (vfio_unmap_unpin in
    # vfio_iommu_type1.c).
    made.at(100, Unmap, "t", 0, 4 * PAGE, 4 * PAGE)
    made.at(101, Attributes, 0, 4 * PAGE, True).at(102, Unmap, "t", 0, 2 * PAGE, 2 * PAGE)
    result = made.at(300, Unmap, "t", 2 * PAGE, 4 * PAGE, 2 * PAGE).audit()
    stale = [f for f in result.findings if f.kind is FindingKind.STALE]
    assert [(f.start, f.end) for f in stale] == [(2 * PAGE, 4 * PAGE)]
    assert FindingKind.DOUBLE_MAP not in kinds(result)
    assert FindingKind.UNMAP_OF_NOTHING not in kinds(result)


def test_broken_rules() -> None:
    made = mapped_and_shared().at(2, Map, "t", 8 * PAGE, 9 * PAGE)
    assert kinds(made.audit()) == [FindingKind.DOUBLE_MAP]
    made = mapped_and_shared().at(2, Unmap, "t", 32 * PAGE, 33 * PAGE, 0)
    assert kinds(made.audit()) == [FindingKind.UNMAP_OF_NOTHING]
    made = mapped_and_shared().at(2, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(made.audit(unmap="whole")) == [FindingKind.BISECTING_UNMAP]
    assert kinds(made.audit(unmap="cut")) == []


def test_a_trace_that_began_late_is_not_accused_of_it() -> None:
    made = Made().at(0, Unmap, "t", 0, PAGE, PAGE).at(1, Map, "t", 0, PAGE)
    result = made.audit()
    assert kinds(result) == []
    assert any("before the trace began" in limit for limit in result.limits)
    made = Made().at(0, Attach, "t").at(0, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(made.audit()) == [FindingKind.UNMAP_OF_NOTHING]


def test_unmaps_without_result_under_the_exact_rule() -> None:
    """
    QEMU's own trace of a server that refuses what is not exact: the trace shows the unmap as if it
    had worked.
    """
    made = Made().at(0, Layout, (), ("t",))
    for page in range(4):
        made.at(1, Map, "t", page * PAGE, (page + 1) * PAGE)
    made.at(50, Unmap, "t", 0, 4 * PAGE)
    trusting = made.audit()
    assert kinds(trusting) == []
    assert any("stale mappings cannot be ruled out" in limit for limit in trusting.limits)
    exact = made.at(90, Detach, "t").audit(unmap="exact")
    stale = [f for f in exact.findings if f.kind is FindingKind.STALE]
    assert [(f.start, f.size, f.duration) for f in stale] == [(0, 4 * PAGE, 40 * MS)]
    assert FindingKind.INEXACT_UNMAP in kinds(exact)


def test_what_the_writer_of_the_trace_saw() -> None:
    made = mapped_and_shared()
    made.at(5, Remark, "overlap", "is mapped already", "t", 0, PAGE)
    made.at(6, Remark, "stale", "was refused", "t", PAGE, 2 * PAGE, stale=True)
    result = made.at(9, Unmap, "t", PAGE, 2 * PAGE, PAGE).audit()
    stale, reported = result.findings
    assert (stale.kind, stale.start, stale.duration) == (FindingKind.STALE, PAGE, 3 * MS)
    assert (reported.kind, reported.note) == (FindingKind.REPORTED, "overlap: is mapped already")


def test_lost_events_are_said() -> None:
    result = mapped_and_shared().at(5, Remark, "lost", "123 events", lost=True).audit()
    assert any("123 events" in limit for limit in result.limits)


@pytest.mark.parametrize("plugged_late", [0, 50])
def test_unplugged_memory(plugged_late: int) -> None:
    made = Made().at(0, Plug, 0, 4 * PAGE, False).at(10, Map, "t", 0, PAGE)
    made.at(10.2 + plugged_late, Plug, 0, PAGE, True)
    expected = [FindingKind.UNPLUGGED] if plugged_late else []
    assert kinds(made.audit()) == expected
    made.at(300, Plug, 0, PAGE, False)
    result = made.at(400, Unmap, "t", 0, PAGE, PAGE).audit()
    assert kinds(result) == [FindingKind.UNPLUGGED, *expected]


def test_a_shared_page_that_is_not_plugged_is_not_missing() -> None:
    made = Made().at(0, Plug, 0, 4 * PAGE, False).at(0, Attributes, 8 * PAGE, 9 * PAGE, False)
    made.at(1, Map, "t", 8 * PAGE, 9 * PAGE).at(10, Attributes, 0, PAGE, False)
    assert kinds(made.at(100, Access, "t", 0, 64, True, False).audit()) == []
    made.at(110, Plug, 0, 4 * PAGE, True)
    assert kinds(made.at(200, Access, "t", 0, 64, True, False).audit()) == [FindingKind.MISSING]


def test_state_changes_count_where_there_is_nothing_better() -> None:
    block = Block(name="ram", start=1 << 32, end=(1 << 32) + 16 * PAGE, confidential=True)
    made = Made().at(0, Layout, (block,)).at(1, Map, "t", 1 << 32, (1 << 32) + PAGE)
    made.at(2, StateChange, None, 0, PAGE, False).at(50, StateChange, None, 0, PAGE, True)
    result = made.at(99, Detach, "t").audit()
    (finding,) = result.findings
    assert (finding.kind, finding.start) == (FindingKind.STALE, 1 << 32)
    made.events[0] = Layout(0, SOURCE, 1, ())
    result = made.audit()
    assert kinds(result) == []
    assert any("--layout" in limit for limit in result.limits)


def test_a_target_that_is_gone_misses_nothing() -> None:
    made = mapped_and_shared().at(5, Detach, "t").at(100, Attributes, 0, 32 * PAGE, False)
    result = made.audit()
    assert kinds(result) == []
    assert [target.name for target in result.targets] == ["t"]


def test_a_target_that_unmaps_everything_is_gone() -> None:
    """VFIO's end, as the kernel shows it: nobody says that it was one."""
    made = mapped_and_shared().at(100, Unmap, "t", 8 * PAGE, 16 * PAGE, 8 * PAGE)
    later = Made()
    later.events = [*made.events]
    later.at(150, Unmap, "t", 0, 8 * PAGE, 8 * PAGE)
    result = later.at(300, Access, "t", 0, 64, False, False).audit()
    assert kinds(result) == []
    assert any("taken for its end" in limit for limit in result.limits)
    assert kinds(made.at(300, Access, "t", 0, 64, False, False).audit()) == [FindingKind.MISSING]
    # Where the trace would say so, nothing is taken for it.
    later.events.insert(0, Layout(0, SOURCE, 0, (), ("t",)))
    assert set(kinds(later.audit())) == {FindingKind.MISSING}


def test_times_that_fall_count_as_simultaneous() -> None:
    made = Made().at(5, Attributes, 0, PAGE, False).at(4, Map, "t", 0, PAGE)
    result = made.at(6, ConversionEnd, 0, PAGE, False).audit()
    assert (result.began, result.ended) == (5 * MS, 6 * MS)


def test_an_empty_trace() -> None:
    result = Made().audit()
    assert (result.events, result.findings, result.began) == (0, [], None)
    assert len(result.limits) >= 2


def test_the_worst_are_kept_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramblock.trace.result.KEPT_OF_A_KIND", 10)
    made = Made()
    lengths = [(7 * number) % 101 + 1 for number in range(100)]
    now = 0.0
    made.at(0, Attributes, 0, PAGE, True)
    for length in lengths:
        made.at(now, Map, "t", 0, PAGE).at(now + length, Unmap, "t", 0, PAGE, PAGE)
        now += length + 100
    result = made.audit()
    assert result.counts[FindingKind.STALE].count == 100
    assert result.counts[FindingKind.STALE].kept == 10
    assert _durations(result.findings) == sorted(lengths, reverse=True)[:10]


def _durations(findings: Sequence[object]) -> list[int]:
    return [round((getattr(finding, "duration", None) or 0) / MS) for finding in findings]


def _unplugging(unmap_at: float | None) -> AuditResult:
    """128 KiB of virtio-mem: QEMU is asked, gives back, unmaps (or not), answers after 5 ms."""
    made = Made().at(0, PlugRequest, 0, 32 * PAGE, True).at(1, Map, "t", 0, 32 * PAGE)
    made.at(2, Plug, 0, 32 * PAGE, True)
    made.at(100, PlugRequest, 0, 32 * PAGE, False).at(101, Discard, 0, 32 * PAGE)
    if unmap_at is not None and unmap_at < 105:
        made.at(unmap_at, Unmap, "t", 0, 32 * PAGE, 32 * PAGE)
    made.at(105, Plug, 0, 32 * PAGE, False)
    if unmap_at is not None and unmap_at >= 105:
        made.at(unmap_at, Unmap, "t", 0, 32 * PAGE, 32 * PAGE)
    return made.at(500, VcpuEntry, "c").audit()


def test_virtio_mem_gives_memory_back_before_it_unmaps() -> None:
    result = _unplugging(103)
    assert kinds(result) == [FindingKind.TRANSITIONAL]
    assert result.findings[0].duration == 2 * MS
    assert result.failures() == 0


@pytest.mark.parametrize("unmap_at", [200, None])
def test_virtio_mem_that_does_not_unmap(unmap_at: float | None) -> None:
    result = _unplugging(unmap_at)
    assert set(kinds(result)) == {FindingKind.FREED, FindingKind.UNPLUGGED}
    assert all(finding.open == (unmap_at is None) for finding in result.findings)


def test_plugging_may_take_long() -> None:
    """
    Mapping 1 GiB block by block takes longer than any grace: the answer ends it, and not time.
    """
    made = Made().at(0, Plug, 0, 8 * PAGE, False).at(1, PlugRequest, 0, 8 * PAGE, True)
    for number in range(8):
        made.at(2 + 100 * number, Map, "t", number * PAGE, (number + 1) * PAGE)
    assert made.at(900, Plug, 0, 8 * PAGE, True).audit().findings == []


def test_plugging_that_is_refused_leaves_what_was() -> None:
    made = Made().at(0, Plug, 0, 8 * PAGE, False).at(1, PlugRequest, 0, 8 * PAGE, True)
    made.at(2, Map, "t", 0, 8 * PAGE)
    made.at(3, Plug, 0, 8 * PAGE, True, False)
    assert kinds(made.at(900, VcpuEntry, "c").audit()) == [FindingKind.UNPLUGGED]


def test_an_unmap_of_what_could_not_be_mapped() -> None:
    """QEMU goes on when a device's BAR cannot be mapped, and unmaps it later like anything else."""
    made = Made().at(0, Map, "t", 0, 4 * PAGE, True, False).at(1, Map, "t", 8 * PAGE, 9 * PAGE)
    made.at(2, Unmap, "t", 0, 4 * PAGE, 0)
    result = made.audit()
    assert result.findings == []
    assert any("maps that failed, 1 of them" in limit for limit in result.limits)
    assert kinds(made.at(3, Unmap, "t", 0, 5 * PAGE, 0).audit()) == [FindingKind.UNMAP_OF_NOTHING]
