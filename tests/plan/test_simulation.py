"""
The formula and the real mapper agree where the formula is exact, and the simulation keeps to its
workload.
"""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramblock.discard.attributes import PageState
from ramblock.dma.target import HostRange
from ramblock.errors import DmaError, UsageError
from ramblock.plan import TARGETS, End, Guest, Profile, Technology, simulate
from ramblock.plan.formula import need
from ramblock.plan.shares import boot_shares, buffer_room
from ramblock.plan.simulation import Place, Simulation, _Target, kind_of
from ramblock.plan.targets import POLICIES
from ramblock.plan.workload import Request, boot_requests, steady_requests
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE

_GUESTS = [
    Guest(memory=512 * MIB, conversions=0),
    Guest(memory=GIB, conversions=0, devices=(Profile.GPU_CC, Profile.NVME), vcpus=7),
    Guest(
        memory=3 * GIB, conversions=0, devices=(Profile.NIC,), technology=Technology.SNP, vcpus=3
    ),
]


@pytest.mark.parametrize("end", list(End))
@pytest.mark.parametrize("guest", _GUESTS)
def test_the_formula_is_exact_for_boot(guest: Guest, end: End) -> None:
    simulated = simulate(guest, end)
    for target in TARGETS:
        for policy in POLICIES:
            if not target.can(policy):
                continue
            wanted = need(guest, policy, target)
            made = simulated.boot[kind_of(target, policy)]
            assert made.entries == getattr(wanted.boot_entries, end)
            assert made.maps == getattr(wanted.boot_maps, end)
            assert made.unmaps == getattr(wanted.boot_unmaps, end)
            assert made.mapped == sum(getattr(share.size, end) for share in boot_shares(guest))
            assert simulated.final == simulated.boot


@settings(max_examples=15, deadline=None)
@given(
    st.integers(256, 900), st.integers(0, 1500), st.integers(0, 2**32), st.sampled_from(list(End))
)
def test_runs_never_need_more_than_pages(
    mebibytes: int, conversions: int, seed: int, end: End
) -> None:
    guest = Guest(memory=mebibytes * MIB, conversions=conversions)
    simulated = simulate(guest, end, seed=seed)
    for _, shared, by_page, by_run in simulated.series:
        assert by_run <= by_page
        assert by_page * PAGE_SIZE == shared
    page, run = simulated.final["page"], simulated.final["run"]
    assert run.peak_entries <= page.peak_entries
    assert run.maps <= page.maps
    assert run.mapped == page.mapped == simulated.shared
    # What the formula says the high end is.
    for kind, policy in zip(("page", "run"), POLICIES, strict=True):
        target = next(target for target in TARGETS if target.can(policy) and not target.exact)
        if policy.value == "run":
            target = next(target for target in TARGETS if target.cuts)
        wanted = need(guest, policy, target)
        assert simulated.final[kind].peak_entries <= wanted.peak_entries.high


def test_the_exact_target_is_told_of_each_mapping() -> None:
    simulated = simulate(Guest(memory=512 * MIB, conversions=500))
    page, exact = simulated.final["page"], simulated.final["page-exact"]
    assert (page.entries, page.maps) == (exact.entries, exact.maps)
    assert exact.unmaps == exact.maps - exact.entries > page.unmaps


def test_the_same_seed_makes_the_same() -> None:
    guest = Guest(memory=512 * MIB, conversions=300)
    assert simulate(guest, seed=5) == simulate(guest, seed=5)
    assert simulate(guest, seed=5) != simulate(guest, seed=6)


def test_buffers_keep_to_their_room() -> None:
    guest = Guest(memory=512 * MIB, conversions=3000)
    shared: set[int] = set()
    boot = {page for request in boot_requests(guest, End.HIGH) for page in _pages(request)}
    cut = 0
    for request in steady_requests(guest, 1):
        touched = set(_pages(request))
        assert not touched & boot
        assert request.gpa + request.size <= guest.memory
        if request.to is PageState.SHARED:
            assert not touched & shared, "only what is private is shared"
            shared |= touched
            assert len(shared) * PAGE_SIZE <= buffer_room(guest)
        else:
            assert touched <= shared
            shared -= touched
            cut += {min(touched) - 1, max(touched) + 1} <= shared
    assert cut > 0, "some are freed in part"


def _pages(request: Request) -> range:
    return range(request.gpa // PAGE_SIZE, (request.gpa + request.size) // PAGE_SIZE)


def test_a_guest_may_be_larger_than_this_host() -> None:
    guest = Guest(memory=1024 * GIB, conversions=20)
    with Simulation([Place(0, guest.memory, confidential=True)]) as simulation:
        simulation.convert(Request(1000 * GIB, 64 * KIB, PageState.SHARED))
        simulation.end_boot()
        counts = simulation.result().final
    assert (counts["page"].entries, counts["run"].entries) == (16, 1)


def test_memory_that_cannot_be_converted_is_not_covered() -> None:
    places = [
        Place(0, 64 * KIB, confidential=True),
        Place(64 * KIB, 64 * KIB, confidential=True),
        Place(128 * KIB, 64 * KIB, confidential=False),
    ]
    with Simulation(places) as simulation:
        for gpa, size, covered in (
            (0, 64 * KIB, True),
            (60 * KIB, 8 * KIB, True),
            (124 * KIB, 8 * KIB, False),
            (128 * KIB, 4 * KIB, False),
            (192 * KIB, 4 * KIB, False),
        ):
            assert simulation.covers(Request(gpa, size, PageState.SHARED)) is covered


def test_long_series_keep_their_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramblock.plan.simulation._MOST_POINTS", 20)
    guest = Guest(memory=512 * MIB, conversions=1000)
    simulated = simulate(guest)
    assert len(simulated.series) <= 41
    assert max(point[3] for point in simulated.series) == simulated.final["run"].peak_entries
    assert simulated.series[-1][0] == simulated.conversions


def test_the_target_of_a_simulation_is_a_strict_one() -> None:
    target = _Target(cuts=True, exact=False)
    target.map(0, HostRange(None, 0, 0, 8 * KIB))
    with pytest.raises(DmaError):
        target.map(4 * KIB, HostRange(None, 0, 0, 8 * KIB))
    assert target.unmap(0, GIB) == 12 * KIB
    assert target.tables == 1


def test_progress_is_told() -> None:
    told: list[int] = []
    guest = Guest(memory=512 * MIB, conversions=2000)
    simulated = simulate(guest, End.LOW, progress=told.append)
    assert sum(told) == simulated.conversions // 500 * 500


def test_a_result_can_be_sent_as_json() -> None:
    simulated = simulate(Guest(memory=256 * MIB, conversions=10), End.LOW)
    assert msgspec.json.decode(msgspec.json.encode(simulated))["conversions"] > 10


@settings(max_examples=15, deadline=None)
@given(st.integers(256, 600), st.integers(0, 800), st.integers(0, 2**32))
def test_pages_counted_are_pages_mapped(mebibytes: int, conversions: int, seed: int) -> None:
    guest = Guest(memory=mebibytes * MIB, conversions=conversions)
    results = []
    for count_pages in (False, True):
        places = [
            Place(0, guest.memory, confidential=True),
            Place(GIB, MIB, confidential=False),
        ]
        with Simulation(places, count_pages=count_pages) as simulation:
            simulation.end_boot()
            for number, request in enumerate(steady_requests(guest, seed)):
                simulation.convert(request)
                simulation.note(number)
                # What is in that state already, and a mixture of both.
                simulation.convert(Request(0, 64 * KIB, request.to))
                simulation.convert(Request(32 * KIB, 64 * KIB, request.to))
                simulation.note(number)
            results.append(simulation.result())
    assert results[0] == results[1]


def test_a_guest_that_is_too_small_for_its_devices() -> None:
    guest = Guest(memory=256 * MIB, devices=(Profile.GPU_CC,) * 8)
    with pytest.raises(UsageError, match="what is shared at boot needs guest addresses up to 0x"):
        simulate(guest, End.HIGH)


def test_a_guest_can_make_two_mappings_with_each_conversion() -> None:
    """
    Every other page is taken back, and then all is shared again: the bound of the formula is
    reached, and not passed.
    """
    pages, cuts = 512, 255
    with Simulation([Place(0, pages * PAGE_SIZE, confidential=True)]) as simulation:
        simulation.convert(Request(0, pages * PAGE_SIZE, PageState.SHARED))
        simulation.end_boot()
        for page in range(1, 2 * cuts, 2):
            simulation.convert(Request(page * PAGE_SIZE, PAGE_SIZE, PageState.PRIVATE))
        simulation.convert(Request(0, pages * PAGE_SIZE, PageState.SHARED))
        result = simulation.result()
    conversions = cuts + 1
    assert result.boot["run"].entries == 1
    assert 1 + 2 * conversions >= result.final["run"].entries == 1 + 2 * cuts
