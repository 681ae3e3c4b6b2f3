"""Conversions of an audit: when one is over, and what is held against whom then."""

import pytest

from made_trace import MS, PAGE, Made, kinds, mapped_and_shared, only, ranges
from ramblock.trace import conversions
from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Conversion,
    ConversionEnd,
    Discard,
    Layout,
    Map,
    Plug,
    PlugRequest,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.findings import FindingKind

QEMU = Source("a.log", "qemu")


@pytest.fixture(params=[4, 0], ids=["looked through", "by address"], autouse=True)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few conversions are looked through, many are found by their pages: the same comes out."""
    monkeypatch.setattr(conversions, "_FEW", request.param)


def begun(vcpu: str | None = None) -> Made:
    """A conversion of page 0 to private begins 100 ms after the start, and its attribute is set."""
    made = mapped_and_shared().at(100, Conversion, 0, PAGE, True, vcpu)
    return made.at(101, Attributes, 0, PAGE, True, vcpu)


def end(made: Made) -> Made:
    return made.at(9000, Access, "t", 0, 64, False, False)


# -- ends


def test_a_conversion_whose_begin_is_told_gets_more_patience() -> None:
    patient = begun().at(800, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(patient.audit()) == [FindingKind.TRANSITIONAL]
    assert kinds(begun().at(1200, Unmap, "t", 0, PAGE, PAGE).audit()) == [FindingKind.STALE]
    quick = mapped_and_shared().at(101, Attributes, 0, PAGE, True)
    assert kinds(quick.at(120, Unmap, "t", 0, PAGE, PAGE).audit()) == [FindingKind.STALE]


def test_the_next_conversion_of_an_unknown_thread_takes_the_patience_away() -> None:
    """It may be of the same thread; then the first is over. After the grace it is taken for it."""
    made = begun().at(115, Conversion, 8 * PAGE, 9 * PAGE, True)
    quick = made.also().at(120, Unmap, "t", 0, PAGE, PAGE)
    (finding,) = only(quick.audit(), FindingKind.STALE)
    assert not finding.grace  # that another begins is what the trace tells
    near = begun().at(105, Conversion, 8 * PAGE, 9 * PAGE, True)
    assert kinds(near.also().at(110, Unmap, "t", 0, PAGE, PAGE).audit()) == [
        FindingKind.TRANSITIONAL
    ]
    (finding,) = only(near.at(116, Unmap, "t", 0, PAGE, PAGE).audit(), FindingKind.STALE)
    assert finding.grace


def test_patience_that_was_taken_does_not_come_back() -> None:
    made = begun().at(105, Conversion, 8 * PAGE, 9 * PAGE, True)
    made.at(106, Attributes, 0, PAGE, True)  # a step: the grace begins anew, and no more
    assert made.also().at(115, Unmap, "t", 0, PAGE, PAGE).audit().failures() == 0
    assert made.also().at(117, Unmap, "t", 0, PAGE, PAGE).audit().failures() == 1
    wide = made.at(107, Attributes, 0, 4 * PAGE, True).at(108, Attributes, 0, 2 * PAGE, True)
    assert wide.at(119, Unmap, "t", 0, 4 * PAGE, 4 * PAGE).audit().failures() > 0


def test_the_next_conversion_of_the_same_vcpu_ends_the_one_before() -> None:
    other = begun("v1").at(102, Conversion, 8 * PAGE, 9 * PAGE, True, "v2")
    assert kinds(other.at(103, Unmap, "t", 0, PAGE, PAGE).audit()) == [FindingKind.TRANSITIONAL]
    same = begun("v1").at(102, Conversion, 8 * PAGE, 9 * PAGE, True, "v1")
    (finding,) = only(same.at(103, Unmap, "t", 0, PAGE, PAGE).audit(), FindingKind.STALE)
    assert not finding.grace


def test_two_vcpus_that_convert_the_same_page() -> None:
    made = mapped_and_shared().at(50, VcpuEntry, "v1").at(50, VcpuEntry, "v2")
    made.at(100, Conversion, 0, PAGE, True, "v1").at(100.1, Conversion, 0, PAGE, True, "v2")
    made.at(101, Attributes, 0, PAGE, True, "v2").at(102, VcpuEntry, "v1")
    going_on = made.also().at(103, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(going_on.audit()) == [FindingKind.TRANSITIONAL]
    over = made.at(103, VcpuEntry, "v2").at(104, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(over.audit()) == [FindingKind.STALE]


def test_an_attribute_of_another_vcpu_is_a_conversion_of_its_own() -> None:
    made = mapped_and_shared().at(50, VcpuEntry, "v1").at(50, VcpuEntry, "v2")
    made.at(100, Conversion, 0, PAGE, True, "v1").at(101, Attributes, 0, PAGE, True, "v2")
    made.at(102, VcpuEntry, "v1").at(103, Unmap, "t", 0, PAGE, PAGE)
    assert kinds(made.audit()) == [FindingKind.TRANSITIONAL]


def test_a_step_without_a_begin_is_of_the_vcpu_that_is_named_first() -> None:
    made = mapped_and_shared().at(50, VcpuEntry, "v1").at(101, Unmap, "t", 0, PAGE, PAGE)
    made.at(102, Attributes, 0, PAGE, False, "v1")  # as before: nothing changes
    late = made.at(500, VcpuEntry, "v1").at(600, Attributes, 0, PAGE, True).audit()
    (finding,) = only(late, FindingKind.MISSING)
    assert not finding.grace  # it was the vCPU's entry that ended it


def test_giving_the_memory_back_is_the_last_step() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, 2 * PAGE, True)
    made.at(100.5, Unmap, "t", 0, PAGE, PAGE).at(101, Discard, 0, PAGE)
    (finding,) = only(made.at(102, Unmap, "t", PAGE, 2 * PAGE).audit(), FindingKind.STALE)
    assert (finding.start, finding.grace) == (PAGE, False)
    # But not where the page's vCPU will tell.
    made = mapped_and_shared().at(50, VcpuEntry, "v")
    made.at(100, Conversion, 0, 2 * PAGE, True, "v").at(100, Attributes, 0, 2 * PAGE, True, "v")
    made.at(100.5, Unmap, "t", 0, PAGE, PAGE).at(101, Discard, 0, PAGE)
    assert set(kinds(made.at(102, Unmap, "t", PAGE, 2 * PAGE).audit())) == {
        FindingKind.TRANSITIONAL
    }
    # Nor where nothing was asked: an unmap that may become a conversion.
    made = mapped_and_shared().at(100, Unmap, "t", 0, PAGE, PAGE).at(101, Discard, 0, PAGE)
    assert made.at(102, Attributes, 0, PAGE, True).audit().findings == []


def test_a_private_discard_is_the_last_step_to_shared() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, PAGE, True)
    made.at(100, Attributes, 0, PAGE, False).at(101, Discard, 0, PAGE, False)
    assert ranges(made.at(102, Map, "t", 0, PAGE).audit(), FindingKind.MISSING) == [(0, 1)]


def test_the_end_of_one_is_not_the_end_of_another() -> None:
    made = begun().at(101.5, Conversion, 8 * PAGE, 9 * PAGE, True)
    made.at(101.6, Attributes, 8 * PAGE, 9 * PAGE, True)
    made.at(102, ConversionEnd, 0, PAGE, True)
    made.at(103, Unmap, "t", 8 * PAGE, 9 * PAGE, PAGE).at(104, Unmap, "t", 0, PAGE, PAGE)
    result = made.audit()
    assert ranges(result, FindingKind.STALE) == [(0, 1)]
    assert ranges(result, FindingKind.TRANSITIONAL) == [(8, 9)]


def test_an_end_of_nothing_ends_nothing() -> None:
    made = begun().at(102, ConversionEnd, 8 * PAGE, 9 * PAGE, True)
    assert kinds(made.at(103, Unmap, "t", 0, PAGE, PAGE).audit()) == [FindingKind.TRANSITIONAL]


def test_where_a_source_tells_all_ends_time_ends_nothing() -> None:
    made = Made().at(0, Layout, (), ("t",), ends=True).at(0, Attributes, 0, PAGE, True)
    made.at(1, ConversionEnd, 0, PAGE, True).at(2, Attributes, 0, PAGE, False)
    assert made.also().at(8000, Map, "t", 0, PAGE).audit().findings == []
    made.at(3, ConversionEnd, 4 * PAGE, 5 * PAGE, True)  # whatever it names: they follow each other
    assert kinds(made.at(8000, Map, "t", 0, PAGE).audit()) == [FindingKind.MISSING]


def test_steps_keep_a_conversion_going() -> None:
    """Maps and unmaps, and of pages whose state does not change, too."""
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 8 * PAGE, False)
    for number in range(8):
        made.at(8 * (number + 1), Map, "t", number * PAGE, (number + 1) * PAGE)
    assert made.audit().findings == []
    made = mapped_and_shared().at(100, Attributes, 0, 4 * PAGE, True)
    made.at(108, Attributes, 0, PAGE, True).at(116, Unmap, "t", 0, 4 * PAGE, 4 * PAGE)
    assert kinds(made.audit()) == [FindingKind.TRANSITIONAL]


def test_a_conversion_grows_with_its_steps() -> None:
    made = mapped_and_shared().at(100, Attributes, 2 * PAGE, 4 * PAGE, True)
    made.at(105, Attributes, 0, 6 * PAGE, True).at(111, Unmap, "t", 5 * PAGE, 6 * PAGE, PAGE)
    made.at(119, Unmap, "t", 0, PAGE, PAGE).at(127, Unmap, "t", PAGE, 5 * PAGE, 4 * PAGE)
    assert set(kinds(made.audit())) == {FindingKind.TRANSITIONAL}


def test_the_end_of_one_source_leaves_others_to_time() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, PAGE, True)
    made.of(QEMU).at(101, Attributes, 4 * PAGE, 5 * PAGE, True)
    made.at(102, Layout, (), ends=True).at(103, ConversionEnd, 4 * PAGE, 5 * PAGE, True)
    (finding,) = only(made.at(120, Unmap, "t", 0, PAGE, PAGE).audit(), FindingKind.STALE)[:1]
    assert (finding.start, finding.grace) == (0, True)


# -- guesses


def test_a_finding_that_a_longer_grace_would_clear_is_marked() -> None:
    late = mapped_and_shared().at(100, Attributes, 0, PAGE, True)
    late.at(120, Unmap, "t", 0, PAGE, PAGE)
    (finding,) = only(late.audit(), FindingKind.STALE)
    assert finding.grace
    assert late.audit(grace=30 * MS).failures() == 0
    assert any("the end of 2 conversions" in limit for limit in late.audit().limits)
    told = begun("v").at(102, VcpuEntry, "v").at(103, Unmap, "t", 0, PAGE, PAGE)
    (finding,) = only(told.audit(), FindingKind.STALE)
    assert not finding.grace
    without = Made().at(0, Attributes, 0, PAGE, True).at(1, Map, "t", 0, PAGE)
    (finding,) = only(end(without).audit(), FindingKind.STALE)
    assert not finding.grace


def test_the_grace_is_up_to_its_last_nanosecond() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, PAGE, True)
    assert made.also().at(110, Unmap, "t", 0, PAGE).audit().failures() == 0
    assert made.also().at(110.000001, Unmap, "t", 0, PAGE).audit().failures() == 1
    assert made.also().at(110, VcpuEntry, "c").audit().failures() == 0
    assert made.also().at(110.000001, VcpuEntry, "c").audit().failures() == 1


def test_only_conversions_whose_states_changed_count_as_guessed() -> None:
    result = mapped_and_shared().at(100, Unmap, "t", 0, PAGE, PAGE).at(500, VcpuEntry, "c").audit()
    assert any("the end of 1 conversions" in limit for limit in result.limits)  # of the first
    made = Made().at(0, Map, "t", 0, PAGE).at(1, Unmap, "t", 0, PAGE).at(99, VcpuEntry, "c")
    assert not any("conversions is not in the trace" in limit for limit in made.audit().limits)


# -- the end of the trace


def test_a_log_that_ends_in_a_conversion_is_of_a_guest_that_stopped() -> None:
    """QEMU exits where a conversion fails, and its log is written line by line."""
    made = Made(source=QEMU).at(0, Attributes, 0, PAGE, False).at(1, Map, "t", 0, PAGE)
    made.at(100, Conversion, 0, PAGE, True).at(101, Attributes, 0, PAGE, True)
    (finding,) = only(made.audit(), FindingKind.STALE)
    assert (finding.open, finding.grace) == (True, True)
    assert finding.note.startswith("the log ends in this conversion")
    made.at(102, Conversion, 8 * PAGE, 9 * PAGE, True)  # it went on
    assert made.audit().findings == []
    for source in (made.source, Source("a.log", "ftrace")):
        # Without its begin, or from the kernel's buffers, which end anywhere.
        other = Made(source=source).at(0, Attributes, 0, PAGE, False).at(1, Map, "t", 0, PAGE)
        if source is not made.source:
            other.at(100, Conversion, 0, PAGE, True)
        result = other.at(101, Attributes, 0, PAGE, True).audit()
        assert result.findings == []
        assert any("1 windows were open at the end" in limit for limit in result.limits)


def test_without_times_all_conversions_are_over_at_the_end() -> None:
    made = Made().at(None, Attributes, 0, PAGE, False).at(None, Map, "t", 0, PAGE)
    (finding,) = only(made.at(None, Attributes, 0, PAGE, True).audit(), FindingKind.STALE)
    assert (finding.open, finding.since, finding.grace) == (True, None, False)


# -- failures


@pytest.mark.parametrize("private", [False, True])
def test_a_conversion_that_failed_is_put_back(private: bool) -> None:
    made = Made().at(0, Attributes, 0, 4 * PAGE, not private)
    made.at(1, Attributes, PAGE, 2 * PAGE, private).at(20, Attach, "t")
    if private:
        made.at(30, Map, "t", 0, PAGE).at(30, Map, "t", 2 * PAGE, 4 * PAGE)
    else:
        made.at(30, Map, "t", PAGE, 2 * PAGE)
    made.at(100, Conversion, 0, 4 * PAGE, private)
    made.at(101, Attributes, 0, 4 * PAGE, private)
    made.at(102, ConversionEnd, 0, 4 * PAGE, private, result="failed")
    assert end(made.also()).audit().failures() == 0
    made.events[-1] = ConversionEnd(102 * MS, made.source, 0, 0, 4 * PAGE, private)
    wrong = FindingKind.STALE if private else FindingKind.MISSING
    expected = [(0, 1), (2, 4)]
    assert ranges(end(made).audit(), wrong) == expected


def test_a_mapping_that_a_failed_conversion_left_is_stale() -> None:
    made = Made().at(0, Attach, "t").at(0, Attributes, 0, 4 * PAGE, True)
    made.at(100, Conversion, 0, 4 * PAGE, False).at(101, Attributes, 0, 4 * PAGE, False)
    made.at(102, Map, "t", 0, 2 * PAGE).at(103, Map, "t", 2 * PAGE, 4 * PAGE, done=False)
    made.at(104, ConversionEnd, 0, 4 * PAGE, False, result="failed")
    result = end(made).audit()
    assert ranges(result, FindingKind.STALE) == [(0, 2)]
    assert ranges(result, FindingKind.MISSING) == []


# -- sources of states


def test_attributes_are_better_than_state_changes() -> None:
    block = Layout(0, QEMU, 0, ())
    made = Made([block]).at(0, Attributes, 0, PAGE, False).at(1, Map, "t", 0, PAGE)
    made.at(2, StateChange, None, 0, PAGE, True)
    result = made.at(500, VcpuEntry, "c").audit()
    assert result.findings == []
    assert not any("relative to a block" in limit for limit in result.limits)


def test_unmapping_what_is_shared_is_missing_from_then_on() -> None:
    made = mapped_and_shared().at(100, Unmap, "t", 0, 2 * PAGE, 2 * PAGE)
    made.at(200, Map, "t", 0, PAGE).at(300, Attributes, 0, 16 * PAGE, True)
    found = only(made.at(400, VcpuEntry, "c").audit(), FindingKind.MISSING)
    assert [(f.start, f.end, f.since, f.until) for f in found] == [
        (0, PAGE, 100 * MS, 200 * MS),
        (PAGE, 2 * PAGE, 100 * MS, 300 * MS),
    ]


def test_a_target_is_expected_to_map_from_its_first_map_of_the_guest() -> None:
    """The kernel maps for its own drivers too, whose addresses are not the guest's."""
    made = Made().at(0, Attributes, 0, 4 * PAGE, False)
    made.at(50, Map, "driver", 100 * PAGE, 101 * PAGE)
    made.at(60, Attributes, 4 * PAGE, 5 * PAGE, False)
    assert end(made.also()).audit().findings == []
    made.at(70, Map, "driver", 0, PAGE).at(80, Attributes, 8 * PAGE, 9 * PAGE, False)
    assert ranges(end(made).audit(), FindingKind.MISSING) == [(8, 9)]


def test_plugging_has_its_answer_and_no_other_end() -> None:
    made = Made().at(0, Plug, 0, 8 * PAGE, False).at(1, PlugRequest, 0, 8 * PAGE, True)
    made.at(900, Map, "t", 0, 8 * PAGE)
    assert made.also().at(5000, Plug, 0, 8 * PAGE, True).audit().findings == []
    # Another's answer ends nothing.
    other = made.also().at(901, Plug, 100 * PAGE, 101 * PAGE, True)
    assert other.at(5000, Plug, 0, 8 * PAGE, True).audit().findings == []
    refused = made.at(901, Plug, 0, 8 * PAGE, True, False).at(5000, VcpuEntry, "c")
    assert kinds(refused.audit()) == [FindingKind.UNPLUGGED]


# -- which conversion a step belongs to


def test_a_step_belongs_to_the_conversion_of_its_vcpu() -> None:
    """Two vCPUs convert the same page: the end of one is not the end of the other."""
    made = mapped_and_shared().at(50, VcpuEntry, "v1").at(51, VcpuEntry, "v2")
    made.at(100, Conversion, 0, PAGE, True, "v1").at(101, Conversion, 0, PAGE, True, "v2")
    made.at(102, Attributes, 0, PAGE, True, "v1")
    mine, others = made.also().at(103, VcpuEntry, "v1"), made.also().at(103, VcpuEntry, "v2")
    assert kinds(end(mine.at(104, Unmap, "t", 0, PAGE, PAGE)).audit()) == [FindingKind.STALE]
    assert kinds(end(others.at(104, Unmap, "t", 0, PAGE, PAGE)).audit()) == [
        FindingKind.TRANSITIONAL
    ]


def test_a_conversion_that_grows_is_found_where_it_grew() -> None:
    made = mapped_and_shared().at(100, Attributes, 0, PAGE, True)
    made.at(105, Attributes, 0, 4 * PAGE, True)  # the same one, and more pages
    for page in range(4):  # each of its steps keeps it going
        made.at(112 + 7 * page, Unmap, "t", page * PAGE, (page + 1) * PAGE, PAGE)
    assert set(kinds(end(made).audit())) == {FindingKind.TRANSITIONAL}


@pytest.mark.parametrize("others", [0, 9])
def test_the_end_of_one_conversion_leaves_its_neighbours(others: int) -> None:
    made = mapped_and_shared()
    for number in range(others):
        page = 64 + 2 * number
        made.at(90, Attributes, page * PAGE, (page + 1) * PAGE, True, f"o{number}")
    made.at(100, Attributes, 0, PAGE, True, "v1").at(100, Attributes, PAGE, 2 * PAGE, True, "v2")
    made.at(101, VcpuEntry, "v1").at(102, Unmap, "t", 0, 2 * PAGE, 2 * PAGE)
    result = end(made).audit()
    assert ranges(result, FindingKind.STALE) == [(0, 1)]
    assert ranges(result, FindingKind.TRANSITIONAL) == [(1, 2)]


def test_a_request_that_is_held_outlives_any_grace_and_ends_with_its_answer() -> None:
    made = Made().at(0, Plug, 0, 8 * PAGE, False).at(1, PlugRequest, 0, 8 * PAGE, True)
    for ms in range(20, 200, 20):  # time passes, and is looked at
        made.at(ms, Access, "t", 0, 64, False, False)
    made.at(300, Map, "t", 0, 8 * PAGE)
    answered = made.also().at(301, Plug, 0, 8 * PAGE, True)
    assert kinds(end(answered).audit()) == []
    refused = made.at(301, Plug, 0, 8 * PAGE, True, False).at(400, Access, "t", 0, 64, False, False)
    assert kinds(end(refused).audit()) == [FindingKind.UNPLUGGED]


def test_a_log_that_ends_in_a_conversion_accuses_only_of_stale_pages() -> None:
    """What is given back a moment before its unmap is no failure, wherever the log ends."""
    made = mapped_and_shared().of(QEMU).at(100, Conversion, 0, PAGE, True)
    freed = made.also().at(101, Discard, 0, PAGE)
    assert kinds(freed.audit()) == []
    assert kinds(made.at(101, Attributes, 0, PAGE, True).audit()) == [FindingKind.STALE]


def test_conversions_are_counted_once() -> None:
    ending = Made().at(0, Layout, (), ("t",), None, False, True)
    ending.at(1, Attributes, 0, PAGE, True).at(2, ConversionEnd, 0, PAGE, private=True)
    assert ending.at(3, ConversionEnd, 0, PAGE, private=True).audit().conversions == 2
    asked = mapped_and_shared().at(100, Conversion, 0, PAGE, True)
    assert asked.at(101, ConversionEnd, 0, PAGE, private=True).audit().conversions == 1
