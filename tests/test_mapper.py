import errno
import logging
from collections.abc import Callable, Iterator

import pytest

from doubles import PAGE, PageSource, attributes_of, runs
from ramblock import GuestMemory, Mapper, MappingPolicy, PageState, RamBlock, VirtioMem
from ramblock.dma import HostRange, SoftIommu
from ramblock.errors import (
    ConversionError,
    DmaError,
    IommuFault,
    MappingLimitError,
    UsageError,
)
from ramblock.testing import FaultyTarget, RecordingTarget
from ramblock.units import GIB, KIB, MIB
from vfio_user_server import RemoteIommu

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
PAGE_POLICY, RUN, AUTO = MappingPolicy.PAGE, MappingPolicy.RUN, MappingPolicy.AUTO
COUNT = 16
BASE = 0x10_0000


class Guest:
    """A confidential block of sixteen pages at BASE, and a target that records."""

    def __init__(
        self, iommu: SoftIommu | RemoteIommu, policy: MappingPolicy = AUTO, limit: int | None = None
    ):
        self.block = RamBlock.create("ram", COUNT * PAGE, private="stand-in")
        self.memory = GuestMemory()
        self.memory.map(self.block, BASE)
        self.iommu = iommu
        self.target = RecordingTarget(iommu)
        self.mapper = self.memory.attach(self.target, policy, max_mappings=limit)

    def share(self, first: int, count: int = 1) -> None:
        self.memory.convert(BASE + first * PAGE, count * PAGE, SHARED)

    def make_private(self, first: int, count: int = 1) -> None:
        self.memory.convert(BASE + first * PAGE, count * PAGE, PRIVATE)

    def calls(self) -> list[tuple[str, int, int]]:
        """What the target was asked since the last time, in pages of the block."""
        calls: list[tuple[str, int, int]] = [
            (verb, (iova - BASE) // PAGE, size // PAGE) for verb, iova, size in self.target.calls
        ]
        self.target.calls.clear()
        return calls

    def mappings(self) -> list[tuple[int, int]]:
        return [
            ((entry.iova - BASE) // PAGE, entry.size // PAGE) for entry in self.iommu.mappings()
        ]

    def check(self) -> None:
        """The mapper's books against the target's table and the block's states."""
        entries = self.iommu.mappings()
        mapped = {
            page
            for entry in entries
            for page in range((entry.iova - BASE) // PAGE, (entry.end - BASE) // PAGE)
        }
        assert runs(mapped) == list(attributes_of(self.block).ranges(SHARED))
        assert self.mapper.entries == len(entries)
        assert self.mapper.mapped_bytes == sum(entry.size for entry in entries)
        for entry in entries:
            # Each IOVA reaches the byte of the block that the guest has there.
            assert entry.memory.offset == entry.iova - BASE
            assert entry.memory.address == self.block.address + entry.iova - BASE
            assert entry.memory.fd == self.block.fd
            assert entry.memory.size == entry.size


@pytest.fixture
def guests() -> Iterator[list[Guest]]:
    made: list[Guest] = []
    yield made
    for guest in made:
        guest.block.close()
        guest.iommu.close()


TARGETS: dict[str, Callable[[], SoftIommu | RemoteIommu]] = {
    "cut": SoftIommu,
    "no cut": lambda: SoftIommu(cut=False),
    "exact": lambda: SoftIommu(exact=True),
    "vfio-user": RemoteIommu,
}


# -- policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "policy", "effective"),
    [
        ("cut", AUTO, RUN),
        ("cut", RUN, RUN),
        ("cut", PAGE_POLICY, PAGE_POLICY),
        ("no cut", AUTO, PAGE_POLICY),
        ("no cut", PAGE_POLICY, PAGE_POLICY),
        ("exact", AUTO, PAGE_POLICY),
        ("exact", PAGE_POLICY, PAGE_POLICY),
        ("vfio-user", AUTO, PAGE_POLICY),
        ("vfio-user", PAGE_POLICY, PAGE_POLICY),
    ],
)
def test_what_a_policy_means(
    guests: list[Guest], kind: str, policy: MappingPolicy, effective: MappingPolicy
) -> None:
    guest = Guest(TARGETS[kind](), policy)
    guests.append(guest)
    assert guest.mapper.policy is effective
    guest.share(2, 4)
    if effective is RUN:
        assert guest.calls() == [("map", 2, 4)]
    else:
        assert guest.calls() == [("map", page, 1) for page in range(2, 6)]
    guest.check()


@pytest.mark.parametrize("kind", ["no cut", "exact", "vfio-user"])
def test_run_needs_a_target_that_cuts(kind: str) -> None:
    memory = GuestMemory()
    with pytest.raises(UsageError, match="policy RUN needs a target that cuts"):
        memory.attach(TARGETS[kind](), RUN)
    assert memory.mappers == ()


@pytest.mark.parametrize("policy", ["run", None, 1, True])
def test_what_is_no_policy(policy: MappingPolicy) -> None:
    with pytest.raises(UsageError, match="is not a mapping policy"):
        GuestMemory().attach(SoftIommu(), policy)


def test_one_mapping_per_run_of_each_conversion(guests: list[Guest]) -> None:
    guests.append(guest := Guest(SoftIommu()))
    guest.share(0, 4)
    guest.share(4, 4)  # touches, and stays a mapping of its own: history fragments
    assert guest.mappings() == [(0, 4), (4, 4)]
    guest.make_private(2, 4)
    assert guest.calls() == [("map", 0, 4), ("map", 4, 4), ("unmap", 2, 4)]
    assert guest.mappings() == [(0, 2), (6, 2)]
    guest.share(0, 16)
    assert guest.calls() == [("map", 2, 4), ("map", 8, 8)]
    assert guest.mappings() == [(0, 2), (2, 4), (6, 2), (8, 8)]
    guest.check()


def test_never_unmap_and_remap(guests: list[Guest]) -> None:
    # The gap would make a device fault on a neighbour that is in use.
    for policy in (RUN, PAGE_POLICY):
        guests.append(guest := Guest(SoftIommu(), policy))
        guest.share(0, 16)
        for page in (3, 8, 15, 0, 4):
            guest.calls()
            guest.make_private(page)
            assert guest.calls() == [("unmap", page, 1)]
            guest.check()
            guest.share(page)
            assert guest.calls() == [("map", page, 1)]


@pytest.mark.parametrize("kind", ["cut", "no cut"])
def test_a_checkerboard_made_private_is_one_unmap(guests: list[Guest], kind: str) -> None:
    guests.append(guest := Guest(TARGETS[kind]()))
    for page in range(0, COUNT, 2):
        guest.share(page)
    assert guest.mapper.entries == COUNT // 2
    guest.calls()
    result = guest.memory.convert(BASE, COUNT * PAGE, PRIVATE)
    assert len(guest.calls()) == result.unmap_calls == 1
    guest.check()


def test_a_gibibyte_made_shared_is_one_map() -> None:
    memory, target = GuestMemory(), RecordingTarget()
    with RamBlock.create("ram", GIB, private="stand-in") as block:
        memory.map(block, 0)
        mapper = memory.attach(target)
        assert memory.convert(0, GIB, SHARED).map_calls == 1
        assert target.calls == [("map", 0, GIB)]
        assert (mapper.entries, mapper.mapped_bytes) == (1, GIB)
        # 512 pages out of the middle, one by one, and all the rest at once.
        for page in range(512):
            memory.convert(GIB // 2 + page * 2 * PAGE, PAGE, PRIVATE)
        assert mapper.entries == 513
        assert memory.convert(0, GIB, PRIVATE).unmap_calls <= 513
        assert (mapper.entries, mapper.mapped_bytes) == (0, 0)


def test_an_exact_target_gets_back_what_it_was_given(guests: list[Guest]) -> None:
    guests.append(guest := Guest(SoftIommu(exact=True)))
    guest.share(1, 3)
    guest.share(6, 2)
    guest.calls()
    guest.make_private(0, 16)
    assert guest.calls() == [("unmap", page, 1) for page in (1, 2, 3, 6, 7)]
    guest.check()


# -- real accesses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [RUN, PAGE_POLICY])
def test_a_device_reads_and_writes_over_several_mappings(
    guests: list[Guest], policy: MappingPolicy
) -> None:
    guests.append(guest := Guest(SoftIommu(), policy))
    guest.share(2, 1)
    guest.share(3, 2)
    guest.share(5, 3)
    data = bytes(range(256)) * 64
    data = data[: 3 * PAGE]
    guest.iommu.write(BASE + 2 * PAGE + 100, data)
    assert guest.block.read(2 * PAGE + 100, len(data)) == data
    guest.block.write(7 * PAGE, b"from the host")
    assert guest.iommu.read(BASE + 7 * PAGE, 13) == b"from the host"
    guest.make_private(3)
    with pytest.raises(IommuFault):
        guest.iommu.read(BASE + 2 * PAGE, 2 * PAGE)
    assert guest.iommu.read(BASE + 4 * PAGE, 10) == guest.block.read(4 * PAGE, 10)


def test_read_only_sections_are_mapped_read_only() -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    memory.attach(iommu)
    with RamBlock.create("rom", 2 * PAGE) as block:
        block.write(0, b"rom")
        memory.map(block, 0, readonly=True)
        assert [entry.writable for entry in iommu.mappings()] == [False]
        assert iommu.read(0, 3) == b"rom"
        with pytest.raises(IommuFault):
            iommu.write(0, b"x")
        # The same block once more, where it may be written.
        memory.map(block, 8 * PAGE)
        iommu.write(8 * PAGE, b"ram")
        assert iommu.read(0, 3) == b"ram"


# -- budgets ---------------------------------------------------------------------------------------


def test_the_smaller_limit_counts() -> None:
    for mine, targets, effective in (
        (None, None, None),
        (5, None, 5),
        (None, 7, 7),
        (5, 7, 5),
        (7, 5, 5),
    ):
        memory = GuestMemory()
        mapper = memory.attach(SoftIommu(max_mappings=targets), max_mappings=mine)
        assert mapper.limit == effective


@pytest.mark.parametrize("limit", [0, -1, True, "5", 2.0])
def test_a_limit_that_is_none(limit: int) -> None:
    memory = GuestMemory()
    with pytest.raises(UsageError, match="is not a positive number"):
        memory.attach(SoftIommu(), max_mappings=limit)
    assert memory.mappers == ()


@pytest.mark.parametrize("where", ["operator", "target"])
def test_a_full_table_refuses_a_conversion_and_nothing_has_changed(
    guests: list[Guest], where: str
) -> None:
    if where == "operator":
        guests.append(guest := Guest(SoftIommu(), limit=3))
    else:
        guests.append(guest := Guest(SoftIommu(max_mappings=3)))
    for page in (0, 4, 8):
        guest.share(page)
    guest.calls()
    with pytest.raises(MappingLimitError) as caught:
        guest.share(12)
    assert (caught.value.limit, caught.value.needed) == (3, 4)
    assert guest.calls() == []
    guest.check()
    assert not guest.memory.poisoned
    guest.make_private(4)
    guest.share(12)
    guest.check()


def test_a_whole_run_needs_one_entry_and_page_by_page_many(guests: list[Guest]) -> None:
    guests.append(guest := Guest(SoftIommu(), RUN, 1))
    guest.share(0, 16)
    guests.append(guest := Guest(SoftIommu(), PAGE_POLICY, 10))
    with pytest.raises(MappingLimitError) as caught:
        guest.share(0, 11)
    assert (caught.value.limit, caught.value.needed) == (10, 11)
    guest.share(0, 10)


@pytest.mark.parametrize(
    ("first", "count", "needed"),
    [
        (0, 16, 1),  # all of it: what goes makes room for what comes back
        (0, 4, 2),  # at an end: one stays, one would have to come back
        (12, 4, 2),
        (4, 4, 3),  # in the middle: two stay, one would have to come back
    ],
)
def test_unmapping_inside_a_mapping_needs_entries_for_it_and_for_its_undo(
    guests: list[Guest], first: int, count: int, needed: int
) -> None:
    for limit in range(1, 4):
        guests.append(guest := Guest(SoftIommu(), limit=limit))
        guest.share(0, 16)
        if limit >= needed:
            guest.make_private(first, count)
            guest.check()
        else:
            guest.calls()
            with pytest.raises(MappingLimitError) as caught:
                guest.make_private(first, count)
            assert (caught.value.limit, caught.value.needed) == (limit, needed)
            assert guest.calls() == []
            guest.check()
        assert not guest.memory.poisoned


@pytest.mark.parametrize("limit", range(1, 8))
@pytest.mark.parametrize("policy", [RUN, PAGE_POLICY])
def test_running_out_never_poisons(guests: list[Guest], policy: MappingPolicy, limit: int) -> None:
    """
    The target has no room beyond the budget either, and every undo happens: the attribute step
    always fails.
    """

    class Refusing:
        on = False

        def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
            if self.on and private:
                raise OSError(errno.ENOMEM, "no")

    vm = Refusing()
    memory = GuestMemory(vm)
    iommu = SoftIommu(max_mappings=limit)
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        memory.map(block, 0)
        mapper = memory.attach(iommu, policy)
        for first in (0, 6, 11):
            try:
                memory.convert(first * PAGE, 3 * PAGE, SHARED)
            except MappingLimitError:
                continue
        before = {page for entry in iommu.mappings() for page in range(entry.iova, entry.end, PAGE)}
        vm.on = True
        for first in range(COUNT):
            for count in range(1, COUNT - first + 1):
                try:
                    memory.convert(first * PAGE, count * PAGE, PRIVATE)
                except (ConversionError, MappingLimitError):
                    assert not memory.poisoned
                mapped = {
                    page
                    for entry in iommu.mappings()
                    for page in range(entry.iova, entry.end, PAGE)
                }
                assert mapped == before
                assert mapper.entries == len(iommu.mappings())


def test_the_operator_hears_of_a_budget_before_it_refuses(
    guests: list[Guest], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    guests.append(guest := Guest(SoftIommu(), PAGE_POLICY, 10))
    guest.share(0, 8)
    assert caplog.text == ""
    guest.share(8, 1)
    assert "9 of 10 mappings will be in use" in caplog.text
    caplog.clear()
    guest.share(9, 1)
    assert caplog.text == ""  # said once
    with pytest.raises(MappingLimitError):
        guest.share(10, 1)
    assert "refused: 11 mappings needed, limit 10" in caplog.text


# -- bigger pages ----------------------------------------------------------------------------------

BIG = 64 * KIB


def test_a_target_with_bigger_pages_than_page_states_have() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", MIB, private="stand-in") as block:
        memory.map(block, 0)
        with pytest.raises(UsageError, match=r"maps pages of 0x10000 bytes, .* changes by 0x1000"):
            memory.attach(SoftIommu(page_size=BIG))
        assert memory.mappers == ()
        assert memory.discards.holds == (block.discard_manager.holds[0],)


def test_and_one_that_is_there_before_the_block() -> None:
    memory, iommu = GuestMemory(), SoftIommu(page_size=BIG)
    memory.attach(iommu)
    with RamBlock.create("ram", MIB, private="stand-in") as block:
        with pytest.raises(UsageError, match="changes by 0x1000"):
            memory.map(block, 0)
        assert memory.sections == ()
        GuestMemory().map(block, 0)


def test_bigger_pages_do_for_memory_that_does_not_change() -> None:
    memory, iommu = GuestMemory(), SoftIommu(page_size=BIG)
    with RamBlock.create("ram", MIB) as block:
        memory.map(block, MIB)
        memory.attach(iommu)
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(MIB, MIB)]


@pytest.mark.parametrize(
    ("iommu", "policy"),
    [
        (SoftIommu(page_size=BIG), RUN),
        (SoftIommu(page_size=BIG), PAGE_POLICY),
        (SoftIommu(page_size=BIG, cut=False), AUTO),
        (SoftIommu(page_size=BIG, exact=True), AUTO),
    ],
    ids=["run", "page", "no cut", "exact"],
)
def test_bigger_pages_with_a_source_that_is_coarse_enough(
    iommu: SoftIommu, policy: MappingPolicy
) -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", MIB) as block:
        memory.map(block, MIB)
        device = VirtioMem(block, BIG)
        mapper = memory.attach(iommu, policy)
        device.plug(0, 4 * BIG)
        per_page = mapper.policy is PAGE_POLICY
        assert mapper.entries == len(iommu.mappings()) == (4 if per_page else 1)
        device.unplug(BIG, BIG)
        device.plug(8 * BIG, BIG)
        expected = [(MIB, BIG), (MIB + 2 * BIG, 2 * BIG), (MIB + 8 * BIG, BIG)]
        if per_page:
            expected[1:2] = [(MIB + 2 * BIG, BIG), (MIB + 3 * BIG, BIG)]
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == expected
        assert mapper.entries == len(expected)
        assert mapper.mapped_bytes == 4 * BIG
        iommu.write(MIB + 3 * BIG - 1, b"ab")
        assert block.read(3 * BIG - 1, 2) == b"ab"
        device.unplug_all()
        assert (mapper.entries, mapper.mapped_bytes, iommu.mappings()) == (0, 0, [])


@pytest.mark.parametrize(
    ("gpa", "offset", "size"), [(PAGE, 0, BIG), (0, PAGE, BIG), (0, 0, BIG + PAGE), (0, 0, PAGE)]
)
def test_sections_that_are_not_made_of_the_targets_pages(gpa: int, offset: int, size: int) -> None:
    memory, iommu = GuestMemory(), SoftIommu(page_size=BIG)
    with RamBlock.create("ram", MIB) as block:
        memory.map(block, gpa, offset=offset, size=size)
        with pytest.raises(UsageError, match="is not made of pages of 0x10000 bytes"):
            memory.attach(iommu)
        assert memory.mappers == ()
        assert iommu.mappings() == []


def test_smaller_pages_than_the_hosts_are_not_used() -> None:
    memory, iommu = GuestMemory(), SoftIommu(page_size=512)
    with RamBlock.create("ram", 4 * PAGE) as block:
        memory.map(block, 0)
        mapper = memory.attach(iommu, PAGE_POLICY)
        assert mapper.page_size == PAGE
        assert [entry.size for entry in iommu.mappings()] == [PAGE] * 4


# -- IOVA ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "fits"),
    [
        (0, True),
        (4 * PAGE, True),
        (5 * PAGE, False),
        (8 * PAGE, False),
        (16 * PAGE, True),
        (15 * PAGE, False),
    ],
)
def test_sections_have_to_lie_in_one_of_the_targets_ranges(gpa: int, fits: bool) -> None:
    memory = GuestMemory()
    iommu = SoftIommu(iova_ranges=((0, 8 * PAGE), (16 * PAGE, 32 * PAGE)))
    with RamBlock.create("ram", 4 * PAGE, private="stand-in") as block:
        memory.map(block, gpa)
        if fits:
            memory.attach(iommu)
            assert memory.convert(gpa, 4 * PAGE, SHARED).map_calls == 1
            return
        with pytest.raises(UsageError, match=r"outside the target's addresses \[0x0, 0x8000\), "):
            memory.attach(iommu)
        assert memory.mappers == ()


def test_a_section_over_two_ranges_that_touch_is_in_neither() -> None:
    # No mapping may cross the border, and the mapper does not cut for that.
    memory = GuestMemory()
    with RamBlock.create("ram", 4 * PAGE) as block:
        memory.map(block, 6 * PAGE)
        with pytest.raises(UsageError, match="outside the target's addresses"):
            memory.attach(SoftIommu(iova_ranges=((0, 8 * PAGE), (8 * PAGE, 16 * PAGE))))


def test_a_section_that_comes_later_has_to_fit_too() -> None:
    memory, iommu = GuestMemory(), SoftIommu(iova_ranges=((0, 8 * PAGE),))
    mapper = memory.attach(iommu)
    with RamBlock.create("ram", 4 * PAGE) as block:
        with pytest.raises(UsageError, match="outside"):
            memory.map(block, 6 * PAGE)
        assert (memory.sections, mapper.listeners, block.placement) == ((), [], None)
        memory.map(block, 4 * PAGE)
        assert mapper.mapped_bytes == 4 * PAGE


# -- several sections and targets ------------------------------------------------------------------


def test_a_mapper_follows_sections_that_come_and_go() -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    mapper = memory.attach(iommu)
    with RamBlock.create("ram", 8 * PAGE) as block:
        low = memory.map(block, 0, size=4 * PAGE)
        high = memory.map(block, BASE, offset=2 * PAGE, size=4 * PAGE)
        assert [(entry.iova, entry.size, entry.memory.offset) for entry in iommu.mappings()] == [
            (0, 4 * PAGE, 0),
            (BASE, 4 * PAGE, 2 * PAGE),
        ]
        assert (mapper.entries, mapper.mapped_bytes) == (2, 8 * PAGE)
        source = PageSource({3, 4})
        block.discard_manager.add_source(source)
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [
            (3 * PAGE, PAGE),
            (BASE + PAGE, 2 * PAGE),
        ]
        memory.unmap(low)
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(BASE + PAGE, 2 * PAGE)]
        memory.unmap(high)
        assert (mapper.entries, mapper.mapped_bytes, mapper.listeners) == (0, 0, [])
        assert not list(block.discard_manager.registry)


def test_several_targets_each_in_its_own_way() -> None:
    memory = GuestMemory()
    iommus = [SoftIommu(), SoftIommu(cut=False), SoftIommu(exact=True), SoftIommu()]
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        memory.map(block, 0)
        mappers = [memory.attach(iommu) for iommu in iommus[:3]]
        memory.convert(0, 8 * PAGE, SHARED)
        mappers.append(memory.attach(iommus[3]))  # a replay of what the others have
        memory.convert(2 * PAGE, 2 * PAGE, PRIVATE)
        for iommu, mapper in zip(iommus, mappers, strict=True):
            mapped = {
                page for entry in iommu.mappings() for page in range(entry.iova, entry.end, PAGE)
            }
            assert mapped == {page * PAGE for page in (0, 1, 4, 5, 6, 7)}
            assert mapper.entries == len(iommu.mappings())
            assert mapper.mapped_bytes == 6 * PAGE
        memory.detach(mappers[1])
        memory.convert(2 * PAGE, 2 * PAGE, SHARED)
        assert [len(iommu.mappings()) for iommu in iommus] == [3, 0, 8, 3]


def test_what_somebody_else_mapped_in_the_target_is_not_touched() -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    with RamBlock.create("ram", 4 * PAGE) as block:
        memory.map(block, 0)
        iommu.map(2 * PAGE, HostRange(block.fd, 0, block.address, PAGE))
        with pytest.raises(DmaError) as caught:
            memory.attach(iommu)
        assert caught.value.errno == errno.EEXIST
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(2 * PAGE, PAGE)]
        assert memory.mappers == ()
        assert not memory.poisoned


def test_what_is_mapped_around_a_mapping_is_all_or_nothing() -> None:
    # A source tells of more than what changed: the mapper maps what is missing, in two calls here.
    memory, iommu = GuestMemory(), SoftIommu()
    with RamBlock.create("ram", 4 * PAGE) as block:
        section = memory.map(block, 0)
        source, manager = PageSource({1}), block.discard_manager
        manager.add_source(source)
        memory.attach(FaultyTarget(iommu, fail_map={3}))
        for number in range(2):  # the second time nothing fails
            source.populated = {0, 1, 2, 3}
            if number == 0:
                with pytest.raises(DmaError, match="map call 3 was told to fail"):
                    manager.notify_populate(source, 0, 4 * PAGE)
                source.populated = {1}
                assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(PAGE, PAGE)]
            else:
                manager.notify_populate(source, 0, 4 * PAGE)
                assert sum(entry.size for entry in iommu.mappings()) == 4 * PAGE
        assert not memory.poisoned
        memory.unmap(section)


def test_a_target_that_refuses_while_attaching(guests: list[Guest]) -> None:
    guests.append(guest := Guest(SoftIommu()))
    for page in (0, 4, 8, 12):
        guest.share(page)
    for policy, number in ((RUN, 3), (PAGE_POLICY, 4)):
        faulty = FaultyTarget(SoftIommu(), fail_map={number})
        with pytest.raises(DmaError, match=f"map call {number} was told to fail"):
            guest.memory.attach(faulty, policy)
        assert isinstance(faulty.inner, SoftIommu)
        assert faulty.inner.mappings() == []
        assert guest.memory.mappers == (guest.mapper,)
    assert not guest.memory.poisoned


def test_text(guests: list[Guest]) -> None:
    guests.append(guest := Guest(SoftIommu(), limit=7))
    guest.share(0, 3)
    assert repr(guest.mapper).startswith("<Mapper run of <RecordingTarget of ")
    assert repr(guest.mapper).endswith(": 1 entries, limit 7>")
    assert "no limit" in repr(GuestMemory().attach(SoftIommu()))
    assert isinstance(guest.mapper, Mapper)
