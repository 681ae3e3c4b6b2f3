"""Guests of an audit: which events are of which, and where their pages are."""

import pytest

from made_trace import MS, PAGE, Made, kinds, only, ranges
from ramblock.trace import audit as audit_module
from ramblock.trace.events import (
    Attach,
    Attributes,
    Block,
    Conversion,
    Discard,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Region,
    Reset,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
    Viommu,
)
from ramblock.trace.findings import FindingKind
from ramblock.trace.result import AuditResult

ONE = Source("node", "ftrace", "qemu-100")
TWO = Source("node", "ftrace", "qemu-200")
KERNEL = Source("kernel", "ftrace")
LOG_A = Source("a.log", "qemu")
LOG_B = Source("b.log", "qemu")
GIB = 1 << 30


def slot(
    start: int, end: int, memfd: int | None = None, offset: int = 0, host: int | None = None
) -> Block:
    return Block(f"slot at {start:#x}", start, end, offset, memfd is not None, host, memfd)


def stale(made: Made) -> list[tuple[int, int]]:
    return ranges(made.audit(), FindingKind.STALE)


# -- which guest


def test_states_and_mappings_of_two_processes_are_never_compared() -> None:
    made = Made(source=ONE).at(0, Attributes, 0, 4 * PAGE, True)
    made.of(TWO).at(1, Attributes, 0, 4 * PAGE, False).at(2, Map, "t", 0, 4 * PAGE)
    result = made.at(100, Unmap, "t", 0, 4 * PAGE, 4 * PAGE).audit()
    assert result.failures() == 0
    assert result.cannot_tell == []
    assert result.judged_bytes == 4 * PAGE
    made.events[0].source = TWO
    assert made.audit().failures() == 0
    made.events[1].source = ONE
    assert ranges(made.audit(), FindingKind.STALE) == [(0, 4)]


def test_states_of_one_process_and_mappings_of_another_say_nothing() -> None:
    made = Made(source=ONE).at(0, Attributes, 0, 4 * PAGE, True)
    made.of(TWO).at(2, Map, "t", 0, 4 * PAGE)
    result = made.audit()
    assert result.cannot_tell == ["page states and mappings are those of different processes"]


def test_a_source_without_a_process_is_of_the_only_guest() -> None:
    """In both orders: QEMU's log beside the kernel's trace of one guest."""
    first = Made(source=LOG_A).at(0, Attributes, 0, 4 * PAGE, True)
    first.of(ONE).at(1, Map, "t", 0, PAGE)
    assert stale(first) == [(0, 1)]
    second = Made(source=ONE).at(0, Attributes, 0, 4 * PAGE, True)
    second.of(LOG_A).at(1, Map, "t", 0, PAGE)
    assert stale(second) == [(0, 1)]
    # The process is known by then, and a second one is another guest.
    first.of(TWO).at(2, Map, "u", 0, PAGE)
    result = first.audit()
    assert ranges(result, FindingKind.STALE) == [(0, 1)]
    assert [target.name for target in result.targets] == ["t", "u of qemu-200"]


def test_a_process_is_not_taken_for_another_that_is_known() -> None:
    made = Made(source=ONE).at(0, Attributes, 0, 4 * PAGE, True)
    assert stale(made.of(TWO).at(1, Map, "t", 0, PAGE)) == []


def _log_of(made: Made, source: Source, at: float, host: int) -> Made:
    made.of(source).at(at, Layout, (slot(0, 4 * PAGE, 7, host=host),))
    made.at(at, Attach, "t").at(at + 1, StateChange, None, 0, 4 * PAGE, False)
    return made.at(at + 2, Map, "t", 0, 4 * PAGE)


def test_logs_of_two_programs_are_two_guests() -> None:
    made = _log_of(_log_of(Made(), LOG_A, 0, GIB), LOG_B, 10, 2 * GIB)
    made.of(LOG_A).at(50, StateChange, None, 0, PAGE, True).at(51, Unmap, "t", 0, PAGE, PAGE)
    made.of(LOG_B).at(52, StateChange, None, 0, 2 * PAGE, True)
    result = made.at(100, Unmap, "t", 0, 2 * PAGE, 2 * PAGE).audit()
    (finding,) = only(result, FindingKind.STALE)
    assert (finding.start, finding.end, finding.target) == (0, 2 * PAGE, "t of b.log")
    assert not {FindingKind.DOUBLE_MAP, FindingKind.MISSING} & set(kinds(result))
    assert [target.mapped_bytes for target in result.targets] == [3 * PAGE, 2 * PAGE]


def test_one_place_that_is_taken_is_enough() -> None:
    made = _log_of(Made(), LOG_A, 0, GIB)
    made.of(LOG_B).at(5, Layout, (slot(64 * PAGE, 65 * PAGE, 3), slot(0, PAGE, 4, host=5 * GIB)))
    result = made.at(6, Map, "u", 0, PAGE).audit()
    assert [target.name for target in result.targets] == ["t", "u of b.log"]


def test_a_program_that_starts_beside_another_is_a_second_guest() -> None:
    made = _log_of(Made(), LOG_A, 0, GIB).of(LOG_B).at(5, Reset)
    made.at(6, Attributes, 0, 4 * PAGE, False).at(60, Map, "u", 0, PAGE)
    result = made.audit()
    assert [target.name for target in result.targets] == ["t", "u of b.log"]


def test_where_no_places_are_known_a_reset_is_of_the_guest_that_there_is() -> None:
    made = Made(source=LOG_A).at(0, Attributes, 0, 4 * PAGE, False).at(1, Map, "t", 0, 4 * PAGE)
    made.of(LOG_B).at(50, Reset).at(500, VcpuEntry, "c")
    assert stale(made) == [(0, 4)]


def test_a_log_that_joined_a_guest_stays_with_it() -> None:
    made = Made().of(LOG_B).at(0, Attributes, 0, 4 * PAGE, False)
    made = _log_of(made, LOG_A, 1, GIB).of(LOG_B).at(50, Reset)
    assert stale(made.at(500, VcpuEntry, "c")) == [(0, 4)]


def test_a_virtual_iommu_that_comes_later_ends_all_windows() -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, False).at(1, Map, "t", 0, 4 * PAGE)
    made.at(2, Discard, 0, PAGE).at(3, Attributes, PAGE, 2 * PAGE, True)
    assert made.at(4, Viommu).at(500, VcpuEntry, "c").audit().findings == []


def test_logs_by_thread_of_one_program_are_one_guest() -> None:
    """Two sources with the same file, or files that tell the same places."""
    threads = Source("a.log", "qemu"), Source("a.log", "qemu")
    same = Source("b.log", "qemu")
    for other in (threads[1], same):
        made = _log_of(Made(), threads[0], 0, GIB)
        made.of(other).at(10, Layout, (slot(0, 4 * PAGE, 7, host=GIB),))
        made.at(50, StateChange, None, 0, PAGE, True)
        assert stale(made.of(threads[0]).at(100, Unmap, "t", 0, PAGE, PAGE)) == [(0, 1)]


def test_a_place_that_is_gone_is_taken_by_nobody() -> None:
    made = _log_of(Made(), LOG_A, 0, GIB)
    made.at(5, Layout, (slot(0, 4 * PAGE, 7, host=GIB),), removed=True)
    made.of(LOG_B).at(10, Layout, (slot(0, 4 * PAGE, 9, host=3 * GIB),))
    result = made.at(11, Map, "u", 0, PAGE).audit()
    assert [target.name for target in result.targets] == ["t", "u"]


def test_a_place_that_goes_is_of_nobody_else() -> None:
    made = _log_of(Made(), LOG_A, 0, GIB).of(LOG_B)
    made.at(10, Layout, (slot(0, 4 * PAGE, 9, host=3 * GIB),), removed=True)
    result = made.at(11, Map, "u", 0, PAGE).audit()
    assert [target.name for target in result.targets] == ["t", "u"]


def test_more_guests_than_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_MOST_GUESTS", 2)
    sources = [Source("node", "ftrace", str(number)) for number in range(3)]

    def trace(count: int) -> AuditResult:
        made = Made()
        for source in sources[:count]:
            made.of(source).at(0, Attributes, 0, PAGE, False).at(0, Map, "t", 0, PAGE)
        return made.audit()

    assert trace(2).cannot_tell == []
    assert any("more targets, or guests" in why for why in trace(3).cannot_tell)


def test_places_that_the_user_tells_are_every_guests() -> None:
    audit = audit_module.Audit()
    audit.place([Block("ram", 4 * PAGE, 8 * PAGE, 0, True)])
    made = Made()
    for source in (ONE, TWO):
        made.of(source).at(0, StateChange, "ram", 0, PAGE, True).at(1, Map, "t", 4 * PAGE, 5 * PAGE)
    made.of(ONE).at(2, Attach, "u").of(LOG_A).at(3, Reset)  # a log that names no process
    audit.feed(made.events)
    result = audit.finish()
    assert len(only(result, FindingKind.STALE)) == 2


# -- slots and resets


def test_a_slot_of_a_guest_memfd_is_private_from_there_on() -> None:
    made = Made().at(0, Map, "t", 0, PAGE).at(1, Layout, (slot(0, 4 * PAGE, 7),))
    result = made.at(500, Unmap, "t", 0, PAGE, PAGE).audit()
    (finding,) = only(result, FindingKind.STALE)
    assert (finding.start, finding.end, finding.since) == (0, PAGE, 1 * MS)
    for ordinary in (
        Layout(1 * MS, made.source, 2, (slot(0, 4 * PAGE),)),
        Layout(1 * MS, made.source, 2, (slot(0, 4 * PAGE, 7),), removed=True),
    ):
        made.events[1] = ordinary
        assert stale(made) == []


def test_parts_of_a_guest_memfd_that_were_seen_stay_as_they_are() -> None:
    made = Made().at(0, Layout, (slot(0, 4 * PAGE, 7),)).at(1, Attributes, 0, 4 * PAGE, False)
    made.at(2, Map, "t", 0, 4 * PAGE)
    # The slot comes again, larger: what is new in it is private.
    made.at(50, Layout, (slot(0, 8 * PAGE, 7),)).at(60, Map, "t", 4 * PAGE, 5 * PAGE)
    assert stale(made.at(500, Unmap, "t", 4 * PAGE, 5 * PAGE, PAGE)) == [(4, 5)]
    # Elsewhere, but the same part of the same descriptor.
    made = Made().at(0, Layout, (slot(0, 4 * PAGE, 7, 2 * PAGE),))
    made.at(1, Layout, (slot(16 * PAGE, 24 * PAGE, 7),)).at(2, Map, "t", 16 * PAGE, 24 * PAGE)
    assert stale(made.at(500, Unmap, "t", 16 * PAGE, 24 * PAGE)) == [(16, 18), (22, 24)]
    # Another descriptor was not seen.
    made = Made().at(0, Layout, (slot(0, 4 * PAGE, 7),)).at(1, Attributes, 0, 4 * PAGE, False)
    made.at(2, Map, "t", 0, 4 * PAGE).at(50, Layout, (slot(0, 4 * PAGE, 8),))
    assert stale(made.at(500, Unmap, "t", 0, 4 * PAGE)) == [(0, 4)]


def test_state_changes_are_offsets_in_a_guest_memfd() -> None:
    """Slots of one guest_memfd are one block: a range may lie in two of them."""
    low, high = slot(0, 8 * PAGE, 7), slot(100 * PAGE, 108 * PAGE, 7, 8 * PAGE)
    made = Made().at(0, Layout, (low, high)).at(1, Map, "t", 200 * PAGE, 201 * PAGE)
    made.at(2, StateChange, None, 6 * PAGE, 10 * PAGE, False)
    made.at(3, Map, "t", 6 * PAGE, 8 * PAGE).at(4, Map, "t", 100 * PAGE, 102 * PAGE)
    made.at(50, StateChange, None, 7 * PAGE, 9 * PAGE, True)
    made.at(500, Unmap, "t", 6 * PAGE, 8 * PAGE).at(501, Unmap, "t", 100 * PAGE, 102 * PAGE)
    assert stale(made) == [(7, 8), (100, 101)]
    # It lies where all of it fits.
    blocks = slot(0, 4 * PAGE, 7), slot(100 * PAGE, 108 * PAGE, 8)
    made = Made().at(0, Layout, blocks).at(1, Map, "t", 100 * PAGE, 108 * PAGE)
    made.at(2, StateChange, None, 2 * PAGE, 6 * PAGE, False).at(50, Map, "u", 0, 4 * PAGE)
    assert set(stale(made)) == {(0, 4), (100, 102), (102, 106), (106, 108)}
    # A slot that is gone is no place.
    made = Made().at(0, Layout, (low, high)).at(1, Layout, (high,), removed=True)
    made.at(2, Map, "t", 0, PAGE).at(3, StateChange, None, 7 * PAGE, 9 * PAGE, False)
    made.at(4, Map, "t", 100 * PAGE, 102 * PAGE).at(5, Map, "t", 7 * PAGE, 8 * PAGE)
    assert stale(made) == [(0, 1), (100, 102)]
    made.events[1] = Layout(1 * MS, made.source, 2, (low,), removed=True)
    assert stale(made) == [(0, 1), (7, 8), (101, 102)]


@pytest.mark.parametrize("how", ["conversion", "map", "unmap", "nothing", "both"])
def test_a_state_change_that_fits_into_several_blocks(how: str) -> None:
    blocks = slot(0, 8 * PAGE, 7), slot(100 * PAGE, 108 * PAGE, 8)
    made = Made().at(0, Layout, blocks, ("t",)).at(1, Map, "t", 200 * PAGE, 201 * PAGE)
    if how == "conversion":
        made.at(2, Conversion, 100 * PAGE, 101 * PAGE, False)
    made.at(2, StateChange, None, 0, PAGE, False)
    if how in ("map", "conversion"):
        made.at(3, Map, "t", 100 * PAGE, 101 * PAGE)
    elif how == "unmap":
        made.at(3, Unmap, "t", 100 * PAGE, 101 * PAGE, 0)
    elif how == "both":
        made.at(3, Map, "t", 0, 200 * PAGE)
    else:
        made.at(3, StateChange, None, 0, PAGE, False)
    result = made.at(600, Reset).audit()
    unplaced = any("relative to a block" in limit for limit in result.limits)
    assert unplaced == (how in ("nothing", "both"))
    if how == "unmap":
        assert ranges(result, FindingKind.MISSING) == [(100, 101)]
    elif how in ("map", "conversion"):
        assert result.failures() == 0


def test_a_state_change_is_within_the_newest_conversion_that_goes_on() -> None:
    blocks = slot(0, 8 * PAGE, 7), slot(100 * PAGE, 108 * PAGE, 8)
    made = Made().at(0, Layout, blocks).at(1, Map, "t", 200 * PAGE, 201 * PAGE)
    made.at(2, Conversion, 0, 8 * PAGE, False).at(3, StateChange, None, 0, PAGE, False)
    made.at(4, Map, "t", 0, PAGE)
    made.at(5000, Conversion, 102 * PAGE, 104 * PAGE, False)
    made.at(5001, StateChange, None, 2 * PAGE, 4 * PAGE, False)
    made.at(5002, Map, "t", 102 * PAGE, 104 * PAGE)
    result = made.at(9000, Reset).at(9500, VcpuEntry, "c").audit()
    assert not any("relative to a block" in limit for limit in result.limits)
    assert stale(made) == [(0, 1), (102, 104)]  # of the reset


def test_a_reset_makes_private_and_shared_pages_that_stay_mapped_stale() -> None:
    made = Made().at(0, Attributes, 0, 8 * PAGE, False).at(1, Map, "t", 0, 8 * PAGE)
    made.at(100, Reset).at(101, Unmap, "t", 0, 4 * PAGE, 4 * PAGE)
    result = made.at(300, Unmap, "t", 4 * PAGE, 8 * PAGE, 4 * PAGE).audit()
    (finding,) = only(result, FindingKind.STALE)
    assert (finding.start, finding.end, finding.since) == (4 * PAGE, 8 * PAGE, 100 * MS)
    assert ranges(result, FindingKind.TRANSITIONAL) == [(0, 4)]


def test_after_a_reset_a_guest_memfd_is_a_new_one() -> None:
    made = Made().at(0, Layout, (slot(0, 4 * PAGE, 7),)).at(1, Attributes, 0, PAGE, False)
    made.at(2, Map, "t", 0, PAGE).at(3, Unmap, "t", 0, PAGE, PAGE).at(4, Reset)
    made.at(5, Attributes, 0, PAGE, False).at(6, Layout, (slot(0, 4 * PAGE, 7),))
    assert stale(made.at(60, Map, "t", 0, PAGE)) == [(0, 1)]


def test_a_reset_ends_conversions() -> None:
    made = Made().at(0, Attributes, 0, 8 * PAGE, False).at(1, Map, "t", 0, 8 * PAGE)
    made.at(2, Attributes, 0, PAGE, True).at(3, Reset)
    assert ranges(made.at(4, Unmap, "t", 0, PAGE, PAGE).audit(), FindingKind.STALE) == [(0, 1)]


# -- a virtual IOMMU, and maps that are not told


def test_with_a_virtual_iommu_nothing_is_compared() -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, True).at(1, Viommu).at(2, Map, "t", 0, PAGE)
    made.at(2, Attach, "u").at(2, Attributes, 20 * PAGE, 21 * PAGE, False)
    made.at(3, Attributes, 8 * PAGE, 9 * PAGE, True).at(4, Map, "t", 8 * PAGE, 9 * PAGE)
    made.at(5, Layout, (slot(0, 4 * PAGE, 7),)).at(6, Plug, 0, 4 * PAGE, False).at(7, Reset)
    result = made.at(500, Unmap, "t", 0, PAGE, PAGE).audit()
    assert result.findings == []
    assert any("IOMMU of its own" in limit for limit in result.limits)
    assert result.cannot_tell == []


def test_mappings_follow_regions_and_states_where_no_map_is_told() -> None:
    """QEMU's type1 has no events of its own; its listener maps what becomes populated."""
    block = Block("ram", 0, 16 * PAGE, 0, True)
    made = Made().at(0, Layout, (block,)).at(1, Region, 32 * PAGE, 40 * PAGE, True)
    made.at(2, StateChange, "ram", 0, 4 * PAGE, False)
    clean = made.also().at(100, StateChange, "ram", 0, 2 * PAGE, True).audit()
    assert clean.failures() == 0
    assert [(t.name, t.mapped_bytes) for t in clean.targets] == [("vfio", 10 * PAGE)]
    assert any("no maps are told" in limit for limit in clean.limits)
    # Attributes without a state change: QEMU's listener was not told.
    broken = made.also().at(100, Attributes, 0, 2 * PAGE, True).at(200, Viommu)
    broken.events.pop()
    broken.at(200, Attributes, 48 * PAGE, 49 * PAGE, False)
    assert stale(broken) == [(0, 2)]
    gone = made.also().at(100, Region, 32 * PAGE, 40 * PAGE, False).audit()
    assert [t.mapped_bytes for t in gone.targets] == [4 * PAGE]
    assert gone.failures() == 0
    assert FindingKind.UNMAP_OF_NOTHING not in kinds(gone)


def test_a_region_that_goes_and_was_not_seen_is_no_unmap() -> None:
    made = Made().at(0, Region, 0, 4 * PAGE, False).at(1, Region, 8 * PAGE, 9 * PAGE, True)
    result = made.at(2, Region, 0, 4 * PAGE, False).audit()
    assert result.findings == []
    assert [(t.maps, t.unmaps) for t in result.targets] == [(1, 0)]


def test_maps_that_are_told_count_alone() -> None:
    made = Made().at(0, Region, 0, 4 * PAGE, True).at(1, Map, "t", 8 * PAGE, 9 * PAGE)
    made.at(2, Attributes, 0, 4 * PAGE, True).at(3, Region, 0, 4 * PAGE, True)
    made.at(4, Map, "u", 8 * PAGE, 9 * PAGE)
    result = made.at(500, Attributes, 0, PAGE, False).audit()
    assert FindingKind.STALE not in kinds(result)
    assert [target.name for target in result.targets] == ["t", "u"]


def test_pages_that_are_plugged_follow_their_states_too() -> None:
    block = Block("mem", PAGE, 16 * PAGE, 0, True)
    made = Made().at(0, Layout, (block,)).at(1, Region, 32 * PAGE, 33 * PAGE, True)
    made.at(2, PlugRequest, PAGE, 5 * PAGE, True).at(2, StateChange, "mem", 0, 8 * PAGE, False)
    made.at(3, Plug, PAGE, 5 * PAGE, True)
    plugged = made.audit()
    assert [t.mapped_bytes for t in plugged.targets] == [5 * PAGE]
    assert plugged.failures() == 0
    made.at(50, StateChange, "mem", 0, PAGE, True).at(60, StateChange, "mem", 0, 2 * PAGE, False)
    assert [t.mapped_bytes for t in made.audit().targets] == [5 * PAGE]
    made.at(100, PlugRequest, PAGE, 3 * PAGE, False).at(101, Plug, PAGE, 3 * PAGE, False)
    assert [t.mapped_bytes for t in made.audit().targets] == [3 * PAGE]
    assert made.at(300, Attributes, 60 * PAGE, 61 * PAGE, False).audit().failures() == 0


# -- virtio-mem


def test_what_is_not_plugged_of_virtio_mems_block_is_not_missing() -> None:
    """Also where no size is told: the whole block is virtio-mem's, and nothing else is."""
    blocks = Block("ram", 0, 8 * PAGE, 0, True), Block("mem", 8 * PAGE, 16 * PAGE, 0, True)
    made = Made().at(0, Layout, blocks, ("t",)).at(1, PlugRequest, 9 * PAGE, 9 * PAGE, True)
    made.at(2, Attributes, 0, 20 * PAGE, False)
    result = made.also().at(500, Viommu).audit()
    assert result.findings == []
    result = made.also().at(500, Attributes, 0, 20 * PAGE, True).audit()
    assert ranges(result, FindingKind.MISSING) == [(0, 8), (16, 20)]
    made.at(3, Plug, 10 * PAGE, 12 * PAGE, True)
    result = made.at(500, Attributes, 0, 20 * PAGE, True).audit()
    assert ranges(result, FindingKind.MISSING) == [(0, 8), (10, 12), (16, 20)]
    assert [f.since for f in only(result, FindingKind.MISSING)] == [2 * MS, 3 * MS, 2 * MS]
