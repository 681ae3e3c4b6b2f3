"""What must hold of every plan, whatever the guest."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.target import MappingPolicy
from ramblock.errors import UsageError
from ramblock.plan import Guest, Limits, OsProfile, Pluggable, Profile, Span, Technology, plan_guest
from ramblock.plan.formula import Need, need, pieces
from ramblock.plan.guest import LEAST_MEMORY
from ramblock.plan.shares import boot_shares, buffers, firmware, later_shares
from ramblock.plan.targets import POLICIES, TARGETS
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE

_MEMORY = st.integers(LEAST_MEMORY // PAGE_SIZE, 4096 * GIB // PAGE_SIZE).map(
    lambda count: count * PAGE_SIZE
)
_PLUGGABLE = st.builds(
    lambda blocks, block: Pluggable(blocks * block, block),
    st.integers(1, 1000),
    st.sampled_from([2 * MIB, 128 * MIB]),
)


@st.composite
def _guests(draw: st.DrawFn) -> Guest:
    swiotlb = draw(st.sampled_from([OsProfile.SWIOTLB, OsProfile.SWIOTLB_DYNAMIC]))
    accept = draw(st.sampled_from([(), (OsProfile.LAZY_ACCEPT,), (OsProfile.EAGER_ACCEPT,)]))
    return Guest(
        memory=draw(_MEMORY),
        vcpus=draw(st.integers(1, 4096)),
        numa_nodes=draw(st.integers(1, 8)),
        devices=tuple(draw(st.lists(st.sampled_from(list(Profile)), max_size=12))),
        os=(swiotlb, *accept),
        technology=draw(st.sampled_from(list(Technology))),
        virtio_mem=draw(st.none() | _PLUGGABLE),
        backing_page=draw(st.sampled_from([4 * KIB, 2 * MIB, GIB])),
        conversions=draw(st.integers(0, 100_000)),
    )


def _spans(found: Need) -> dict[str, Span]:
    return {name: value for name, value in _fields(found) if isinstance(value, Span)}


def _fields(found: Need) -> list[tuple[str, object]]:
    return [(name, getattr(found, name)) for name in found.__struct_fields__]


def _every(guest: Guest) -> list[Need]:
    return [
        need(guest, policy, target)
        for target in TARGETS
        for policy in POLICIES
        if target.can(policy)
    ]


@given(_guests())
def test_ranges_are_ranges(guest: Guest) -> None:
    guest.check()
    for found in _every(guest):
        for name, span in _spans(found).items():
            assert 0 <= span.low <= span.expected <= span.high, name
    for share in [*boot_shares(guest), *later_shares(guest), buffers(guest), firmware()]:
        for span in (share.size, share.requests):
            assert 0 <= span.low <= span.expected <= span.high, share.name
        assert not (share.size.low | share.size.expected | share.size.high) % PAGE_SIZE, share.name


@given(_guests(), _MEMORY)
def test_more_memory_never_needs_less(guest: Guest, memory: int) -> None:
    small, large = sorted((guest.memory, memory))
    less = msgspec.structs.replace(guest, memory=small)
    more = msgspec.structs.replace(guest, memory=large)
    for before, after in zip(_every(less), _every(more), strict=True):
        assert before.worst_entries <= after.worst_entries
        for name, span in _spans(before).items():
            if name == "held_twice":
                continue  # what is left of huge pages depends on where the last one ends
            other = _spans(after)[name]
            for end in ("low", "expected", "high"):
                assert getattr(span, end) <= getattr(other, end), (name, end)


@given(_guests())
def test_runs_never_need_more_than_pages(guest: Guest) -> None:
    target = next(target for target in TARGETS if target.cuts)
    by_page = need(guest, MappingPolicy.PAGE, target)
    by_run = need(guest, MappingPolicy.RUN, target)
    for name in ("boot_entries", "peak_entries", "final_entries", "boot_maps", "boot_unmaps"):
        for end in ("low", "expected", "high"):
            run, page = getattr(getattr(by_run, name), end), getattr(getattr(by_page, name), end)
            assert run <= page, (name, end)


@given(_guests())
def test_nothing_is_larger_than_the_guest(guest: Guest) -> None:
    for found in _every(guest):
        assert found.shared.high <= guest.most_memory
        assert found.peak_entries.high <= found.worst_entries
        assert found.held_twice.high <= guest.most_memory + GIB


@given(_guests())
def test_sections_are_all_of_the_memory(guest: Guest) -> None:
    sections = guest.sections()
    assert sum(sections) == guest.most_memory
    assert all(size > 0 and not size % PAGE_SIZE for size in sections)


@given(st.integers(1, 10_000), st.integers(1, 200), st.none() | st.integers(1, 600))
def test_pieces(count: int, requests: int, in_slice: int | None) -> None:
    """Counted by cutting."""
    requests = min(count, requests)
    sizes = [count // requests + (number < count % requests) for number in range(requests)]
    if in_slice is None:
        expected = requests
    else:
        expected = sum(len(range(0, size, in_slice)) for size in sizes)
    slice_size = None if in_slice is None else in_slice * PAGE_SIZE
    assert pieces(count * PAGE_SIZE, requests, slice_size) == expected


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"memory": 128 * MIB}, "memory of 128 MiB"),
        ({"memory": GIB + 1}, "memory of"),
        ({"memory": 1 << 60}, "memory of"),
        ({"vcpus": 0}, "0 vCPUs"),
        ({"vcpus": 4097}, "4097 vCPUs"),
        ({"numa_nodes": 129}, "129 NUMA nodes"),
        ({"numa_nodes": 0}, "0 NUMA nodes"),
        ({"conversions": -1}, "-1 conversions"),
        ({"backing_page": 8 * KIB}, "pages of 8 KiB"),
        ({"os": (OsProfile.SWIOTLB, OsProfile.SWIOTLB_DYNAMIC)}, "exclude each other"),
        ({"os": (OsProfile.LAZY_ACCEPT, OsProfile.EAGER_ACCEPT)}, "exclude each other"),
        ({"virtio_mem": Pluggable(GIB, 3 * MIB)}, "blocks of 0x300000"),
        ({"virtio_mem": Pluggable(3 * MIB, 2 * MIB)}, "virtio-mem of 0x300000"),
        ({"virtio_mem": Pluggable(0, 2 * MIB)}, "virtio-mem of 0x0"),
    ],
)
def test_guests_that_make_no_sense(fields: dict[str, object], what: str) -> None:
    guest = Guest(**{"memory": GIB, **fields})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=what) as caught:
        plan_guest(guest, Limits())
    assert caught.value.expected


def test_a_span_that_is_none() -> None:
    with pytest.raises(UsageError, match="3 to 2"):
        Span.between(3, 2)


def test_pinned_memory_against_its_limit() -> None:
    plan = plan_guest(Guest(memory=4 * GIB), Limits(memlock=8 * MIB))
    row = next(each for each in plan.rows if each.target == "iommufd")
    assert row.verdict == "refused"
    (advice,) = (each for each in plan.advice if "LimitMEMLOCK" in each.setting)
    mappings_for_all = Limits(
        memlock=8 * MIB, dma_entry_limit=10**7, server_maps=10**7, max_iotlb_entries=10**7
    )
    assert [
        each.setting for each in plan_guest(Guest(memory=4 * GIB), mappings_for_all).advice
    ] == [advice.setting]
    assert advice.number is not None
    enough = plan_guest(Guest(memory=4 * GIB), Limits(memlock=advice.number))
    assert next(each for each in enough.rows if each.target == "iommufd").verdict == "fits"
    # A vfio-user server maps the memory itself, and nothing is pinned for it.
    row = next(each for each in plan.rows if each.target == "vfio-user")
    assert [room.name for room in row.headroom] == ["max_dma_maps of the server"]


def test_accepted_memory_is_held() -> None:
    limits = Limits(cgroup=2 * GIB)
    lazy = plan_guest(Guest(memory=4 * GIB), limits)
    eager = plan_guest(
        Guest(memory=4 * GIB, os=(OsProfile.SWIOTLB, OsProfile.EAGER_ACCEPT)), limits
    )
    verdicts = [
        next(each for each in plan.rows if each.target == "iommufd").verdict
        for plan in (lazy, eager)
    ]
    assert verdicts == ["may not fit", "refused"]


def test_huge_pages_are_held_twice() -> None:
    small = need(Guest(memory=4 * GIB), MappingPolicy.PAGE, TARGETS[0])
    huge = need(Guest(memory=4 * GIB, backing_page=GIB), MappingPolicy.PAGE, TARGETS[0])
    assert small.held_twice.high == 2 * MIB
    assert huge.held_twice.high > GIB


def test_a_guest_that_shares_more_than_it_has() -> None:
    guest = Guest(memory=256 * MIB, devices=(Profile.GPU_CC,) * 64)
    plan = plan_guest(guest, Limits())
    assert plan.hopeless
    assert "the guest would share" in plan.rows[0].why
    for row in plan.rows:
        if row.need is not None:
            assert row.need.pinned.low <= row.need.pinned.high


def test_a_device_that_is_none_pins_nothing() -> None:
    target = next(target for target in TARGETS if target.name == "vhost-vdpa")
    with_none = need(Guest(memory=GIB, devices=(Profile.NONE,) * 3), MappingPolicy.PAGE, target)
    assert with_none.pinned == need(Guest(memory=GIB), MappingPolicy.PAGE, target).pinned
