import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import (
    PAGE,
    PageSource,
    PageSourceWithRanges,
    RecordingListener,
    RecordingVm,
    RefusalError,
    attributes_of,
    discard,
    pages,
    populate,
    section,
)
from ramblock import (
    ConversionResult,
    GuestMemory,
    MappingPolicy,
    PageState,
    RamBlock,
    RamSection,
    VirtioMem,
)
from ramblock.dma import SoftIommu
from ramblock.errors import (
    ConversionError,
    DmaError,
    IommuFault,
    MappingLimitError,
    PoisonedError,
    UsageError,
)
from ramblock.guest import MemorySlots, Vm
from ramblock.hostmem import StandInPrivate
from ramblock.testing import FaultyTarget, RecordingTarget, pages_of
from ramblock.units import GIB, TIB

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 8
LOW = 0x10_0000
HIGH = LOW + COUNT * PAGE


class Guest:
    """
    Two confidential blocks side by side, ordinary RAM behind a hole, two targets, and a VM that
    notes everything.
    """

    def __init__(self) -> None:
        self.vm = RecordingVm()
        self.memory = GuestMemory(self.vm)
        self.low = RamBlock.create("low", COUNT * PAGE, private="stand-in")
        self.high = RamBlock.create("high", COUNT * PAGE, private="stand-in")
        self.ordinary = RamBlock.create("ordinary", COUNT * PAGE)
        self.memory.map(self.low, LOW)
        self.memory.map(self.high, HIGH)
        self.memory.map(self.ordinary, HIGH + 2 * COUNT * PAGE)
        self.iommus = [SoftIommu(), SoftIommu(cut=False)]
        self.targets = [FaultyTarget(iommu) for iommu in self.iommus]
        self.mappers = [self.memory.attach(target) for target in self.targets]
        self.vm.take_calls()

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return self.low, self.high, self.ordinary

    def picture(self) -> object:
        """Everything that a call that fails must leave as it was."""
        return (
            self.memory.sections,
            list(self.memory.ranges(SHARED)),
            list(self.memory.ranges(PRIVATE)),
            sorted(self.vm.private),
            sorted(self.vm.slots, key=lambda placed: placed.gpa),
            [
                {page for entry in iommu.mappings() for page in range(entry.iova, entry.end, PAGE)}
                for iommu in self.iommus
            ],
            [mapper.mapped_bytes for mapper in self.memory.mappers],
            [block.allocated_bytes() for block in self.blocks],
            [hold.owner for hold in self.memory.discards.holds],
            [block.discard_manager.sources for block in self.blocks],
            [len(list(block.discard_manager.registry)) for block in self.blocks],
            self.memory.poisoned,
        )

    def close(self) -> None:
        for block in self.blocks:
            block.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


# -- placing blocks --------------------------------------------------------------------------------


def test_an_empty_memory() -> None:
    memory = GuestMemory()
    assert memory.sections == ()
    assert memory.mappers == ()
    assert list(memory.ranges(SHARED)) == list(memory.ranges(PRIVATE)) == []
    assert memory.poisoned is False
    assert memory.in_doubt() == []
    assert repr(memory) == "<GuestMemory: 0 sections, 0 targets>"


def test_the_protocols_that_a_vm_has() -> None:
    vm: Vm = RecordingVm()
    assert isinstance(vm, MemorySlots)


def test_map_gives_the_section() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 8 * PAGE) as block:
        whole = memory.map(block, LOW)
        assert whole == RamSection(block, 0, 8 * PAGE, LOW)
        part = memory.map(block, 0, offset=2 * PAGE, size=3 * PAGE, readonly=True)
        assert part == RamSection(block, 2 * PAGE, 3 * PAGE, 0, readonly=True)
        rest = memory.map(block, 4 * LOW, offset=6 * PAGE)
        assert rest.size == 2 * PAGE
        assert memory.sections == (part, whole, rest)


def test_from_the_first_moment_attributes_are_private_before_the_slot_exists() -> None:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        # Shared before it was placed: made private with the rest, then shared, and only then can
        # the guest see it.
        attributes_of(block).state_change(2 * PAGE, PAGE, SHARED)
        attributes_of(block).state_change(5 * PAGE, 2 * PAGE, SHARED)
        seen: list[set[int]] = []
        vm.then = lambda call: seen.append(vm.private.copy()) if call[0] == "add" else None
        placed = memory.map(block, LOW)
        base = LOW // PAGE
        assert vm.take_calls() == [
            ("private", base, 8),
            ("shared", base + 2, 1),
            ("shared", base + 5, 2),
            ("add", base, 8),
        ]
        assert vm.slots == [placed]
        assert vm.private == {base + page for page in (0, 1, 3, 4, 7)}
        memory.unmap(placed)
        assert vm.take_calls() == [("remove", base, 8), ("shared", base, 8)]
        assert (vm.slots, vm.private) == ([], set())


def test_targets_map_only_after_the_attributes_are_set() -> None:
    order: list[str] = []
    vm = RecordingVm()
    vm.then = lambda call: order.append(call[0])
    memory = GuestMemory(vm)
    target = RecordingTarget()
    memory.attach(target)
    listener = RecordingListener()
    listener.then = lambda call: order.append(call.verb)
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(0, PAGE, SHARED)
        placed = memory.map(block, LOW)
        order.append(f"{len(target.calls)} mapped")
        assert order == ["private", "shared", "add", "1 mapped"]
        memory.unmap(placed)
        assert target.calls == [("map", LOW, PAGE), ("unmap", LOW, PAGE)]


def test_ordinary_ram_has_a_slot_and_no_attributes() -> None:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    with RamBlock.create("ram", PAGE) as block:
        memory.unmap(memory.map(block, 0))
        assert vm.calls == [("add", 0, 1), ("remove", 0, 1)]


def test_a_vm_without_memory_slots() -> None:
    class Attributes:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int, bool]] = []

        def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
            self.calls.append((gpa, size, private))

    vm = Attributes()
    memory = GuestMemory(vm)
    with RamBlock.create("ram", PAGE, private="stand-in") as block:
        memory.unmap(memory.map(block, 0))
    assert vm.calls == [(0, PAGE, True), (0, PAGE, False)]


HOSTILE: list[Any] = [
    -1,
    -PAGE,
    1,
    PAGE + 1,
    1 << 64,
    (1 << 64) + PAGE,
    10**40,
    None,
    True,
    "0",
    b"0",
    0.0,
    4096.0,
]


@pytest.mark.parametrize("gpa", [*HOSTILE, (1 << 64) - PAGE, -(1 << 64)])
def test_map_at_a_bad_address(guest: Guest, gpa: int) -> None:
    before = guest.picture()
    with RamBlock.create("new", 2 * PAGE, private="stand-in") as block:
        with pytest.raises(UsageError):
            guest.memory.map(block, gpa)
        assert guest.picture() == before
        assert guest.vm.calls == []
        GuestMemory().map(block, 0)  # it belongs to nobody


BAD_PARTS: list[dict[str, Any]] = [
    *({"offset": bad} for bad in HOSTILE),
    *({"size": bad} for bad in HOSTILE if bad is not None),  # None: to the end
    {"offset": PAGE, "size": 2 * PAGE},
    {"offset": 2 * PAGE},
    {"size": 0},
]


@pytest.mark.parametrize("part", BAD_PARTS)
def test_map_of_a_bad_part(guest: Guest, part: dict[str, Any]) -> None:
    before = guest.picture()
    with RamBlock.create("new", 2 * PAGE) as block:
        with pytest.raises(UsageError):
            guest.memory.map(block, 0, **part)
        assert block.placement is None
    assert guest.picture() == before


@pytest.mark.parametrize("thing", [None, "ram", 3, object()])
def test_map_of_what_is_no_block(guest: Guest, thing: RamBlock) -> None:
    before = guest.picture()
    with pytest.raises(UsageError, match="is not a RAM block"):
        guest.memory.map(thing, 0)
    assert guest.picture() == before


@pytest.mark.parametrize("private", [None, "stand-in"])
@pytest.mark.parametrize(
    ("first", "count"), [(0, 8), (-2, 3), (7, 3), (2, 2), (-1, 10), (7, 1), (8, 1)]
)
def test_sections_do_not_overlap_in_guest_addresses(
    guest: Guest, private: str | None, first: int, count: int
) -> None:
    before = guest.picture()
    with RamBlock.create("new", count * PAGE, private=private) as block:
        with pytest.raises(UsageError, match=r"overlaps .* in guest addresses"):
            guest.memory.map(block, LOW + first * PAGE)
        assert guest.picture() == before
        assert guest.vm.calls == []
        assert block.placement is None


def test_sections_of_a_confidential_block_do_not_overlap_in_the_block() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        memory.map(block, 0, offset=2 * PAGE, size=4 * PAGE)
        for first, count in ((0, 3), (5, 3), (3, 1), (0, 8), (2, 4)):
            with pytest.raises(UsageError, match=r"overlaps .* in the block"):
                memory.map(block, LOW, offset=first * PAGE, size=count * PAGE)
        memory.map(block, LOW, size=2 * PAGE)
        memory.map(block, 2 * LOW, offset=6 * PAGE)
        # One state per page, wherever it appears.
        memory.convert(LOW, 2 * PAGE, SHARED)
        memory.convert(2 * LOW, PAGE, SHARED)
        assert list(attributes_of(block).ranges(SHARED)) == [(0, 2 * PAGE), (6 * PAGE, PAGE)]
        assert list(memory.ranges(SHARED)) == [(LOW, 2 * PAGE), (2 * LOW, PAGE)]


def test_ordinary_ram_may_appear_at_several_addresses() -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    memory.attach(iommu)
    with RamBlock.create("ram", 4 * PAGE) as block:
        memory.map(block, 0)
        memory.map(block, LOW, offset=PAGE, size=2 * PAGE)
        iommu.write(LOW, b"alias")
        assert iommu.read(PAGE, 5) == block.read(PAGE, 5) == b"alias"


def test_a_block_in_two_memories(guest: Guest) -> None:
    other = GuestMemory(vm := RecordingVm())
    with pytest.raises(UsageError, match="is in another guest memory already"):
        other.map(guest.low, 0)
    assert (other.sections, vm.calls) == ((), [])
    guest.memory.unmap(guest.memory.sections[0])
    other.map(guest.low, 0)


def test_a_block_that_left_can_come_back_and_keeps_its_states(guest: Guest) -> None:
    guest.memory.convert(LOW, 2 * PAGE, SHARED)
    guest.low.write(0, b"kept")
    placed = guest.memory.sections[0]
    guest.memory.unmap(placed)
    assert attributes_of(guest.low).shared_bytes == 2 * PAGE
    assert all(iommu.mappings()[0].iova > LOW for iommu in guest.iommus)
    guest.memory.map(guest.low, 0)
    assert guest.iommus[0].read(0, 4) == b"kept"
    assert guest.vm.private >= pages(2 * PAGE, 6 * PAGE)
    assert not guest.vm.private & {0, 1}


def test_unmap_of_what_is_not_there(guest: Guest) -> None:
    placed = guest.memory.sections[0]
    before = guest.picture()
    for wrong in (
        None,
        "section",
        RamSection(guest.low, 0, PAGE, LOW),
        RamSection(guest.low, 0, COUNT * PAGE, LOW, readonly=True),
        RamSection(guest.high, 0, COUNT * PAGE, LOW),
    ):
        with pytest.raises(UsageError, match="is not mapped here"):
            guest.memory.unmap(wrong)  # type: ignore[arg-type]  # hostile on purpose
    assert guest.picture() == before
    guest.memory.unmap(placed)
    with pytest.raises(UsageError, match="is not mapped here"):
        guest.memory.unmap(placed)


@pytest.mark.parametrize("step", ["private", "add"])
def test_map_is_all_or_nothing_towards_the_vm(guest: Guest, step: str) -> None:
    before = guest.picture()
    guest.vm.refuse = lambda call: call[0] == step
    with RamBlock.create("new", 2 * PAGE, private="stand-in") as block:
        with pytest.raises(OSError, match="the VM refuses"):
            guest.memory.map(block, 0)
        assert guest.picture() == before
        assert block.placement is None
        guest.vm.refuse = lambda _: False
        guest.memory.map(block, 0)


@pytest.mark.parametrize("which", [0, 1])
def test_map_is_all_or_nothing_towards_the_targets(guest: Guest, which: int) -> None:
    with RamBlock.create("new", 4 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(0, PAGE, SHARED)
        attributes_of(block).state_change(2 * PAGE, PAGE, SHARED)
        before = guest.picture()
        target = guest.targets[which]
        target.fail_map = {target.map_calls + 2}
        with pytest.raises(DmaError, match="told to fail"):
            guest.memory.map(block, 0)
        assert guest.picture() == before
        assert list(block.discard_manager.registry) == []
        guest.memory.map(block, 0)


def test_map_is_all_or_nothing_towards_a_budget(guest: Guest) -> None:
    guest.memory.attach(SoftIommu(), max_mappings=2)
    with RamBlock.create("new", 4 * PAGE, private="stand-in") as block:
        for page in (0, 2):
            attributes_of(block).state_change(page * PAGE, PAGE, SHARED)
        before = guest.picture()
        with pytest.raises(MappingLimitError) as caught:
            guest.memory.map(block, 0)
        assert (caught.value.limit, caught.value.needed) == (2, 3)
        assert guest.picture() == before
        assert guest.vm.calls == []


@pytest.mark.parametrize("step", ["remove", "shared"])
def test_unmap_is_all_or_nothing_towards_the_vm(guest: Guest, step: str) -> None:
    guest.memory.convert(LOW, 2 * PAGE, SHARED)
    before = guest.picture()
    refused = False

    def refuse_once(call: tuple[str, int, int]) -> bool:
        nonlocal refused
        if refused or call[0] != step:
            return False
        refused = True
        return True

    guest.vm.refuse = refuse_once
    with pytest.raises(OSError, match="the VM refuses"):
        guest.memory.unmap(guest.memory.sections[0])
    assert refused
    assert guest.picture() == before
    guest.memory.unmap(guest.memory.sections[0])


@pytest.mark.parametrize("which", [0, 1])
def test_unmap_is_all_or_nothing_towards_the_targets(guest: Guest, which: int) -> None:
    for page in (0, 2, 4):
        guest.memory.convert(LOW + page * PAGE, PAGE, SHARED)
    before = guest.picture()
    target = guest.targets[which]
    target.fail_unmap = {target.unmap_calls + 1}
    with pytest.raises(DmaError, match="told to fail"):
        guest.memory.unmap(guest.memory.sections[0])
    assert guest.picture() == before


# -- devices ---------------------------------------------------------------------------------------


def test_unmap_goes_targets_then_slot_then_attributes(guest: Guest) -> None:
    guest.memory.convert(LOW, PAGE, SHARED)
    order: list[tuple[str, bool]] = []

    def note(call: tuple[str, int, int]) -> None:
        there = any(entry.iova == LOW for iommu in guest.iommus for entry in iommu.mappings())
        order.append((call[0], there))

    guest.vm.then = note
    guest.memory.unmap(guest.memory.sections[0])
    assert order == [("remove", False), ("shared", False)]


def test_attach_and_detach(guest: Guest) -> None:
    guest.memory.convert(LOW + PAGE, 2 * PAGE, SHARED)
    iommu = SoftIommu()
    mapper = guest.memory.attach(iommu)
    assert guest.memory.mappers == (*guest.mappers, mapper)
    assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [
        (LOW + PAGE, 2 * PAGE),
        (HIGH + 2 * COUNT * PAGE, COUNT * PAGE),
    ]
    guest.memory.detach(mapper)
    assert iommu.mappings() == []
    assert guest.memory.mappers == tuple(guest.mappers)
    guest.memory.convert(LOW + PAGE, PAGE, PRIVATE)
    assert iommu.mappings() == []
    with pytest.raises(UsageError, match="is not attached here"):
        guest.memory.detach(mapper)


def test_detach_does_not_close_the_target(guest: Guest) -> None:
    closed: list[str] = []

    class Closing(SoftIommu):
        def close(self) -> None:
            closed.append("closed")

    target = Closing()
    guest.memory.detach(guest.memory.attach(target))
    assert closed == []
    guest.memory.attach(target)  # and it can come back


def test_one_target_is_attached_once(guest: Guest) -> None:
    before = guest.picture()
    with pytest.raises(UsageError, match="is attached already"):
        guest.memory.attach(guest.targets[0])
    assert guest.picture() == before


@pytest.mark.parametrize("thing", [None, 3, "target", object()])
def test_attach_of_what_is_no_target(guest: Guest, thing: SoftIommu) -> None:
    before = guest.picture()
    with pytest.raises(UsageError, match="is not a DMA target"):
        guest.memory.attach(thing)
    assert guest.picture() == before


@pytest.mark.parametrize("thing", [None, 3, "mapper", object()])
def test_detach_of_what_is_not_attached(guest: Guest, thing: object) -> None:
    before = guest.picture()
    with pytest.raises(UsageError, match="is not attached here"):
        guest.memory.detach(thing)  # type: ignore[arg-type]  # hostile on purpose
    assert guest.picture() == before


def test_a_mapper_of_another_memory(guest: Guest) -> None:
    with pytest.raises(UsageError, match="is not attached here"):
        GuestMemory().detach(guest.mappers[0])


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("cut", [True, False])
def test_attach_is_all_or_nothing(guest: Guest, cut: bool, number: int) -> None:
    for page in (0, 2, 9):
        guest.memory.convert(LOW + page * PAGE, PAGE, SHARED)
    before = guest.picture()
    iommu = SoftIommu(cut=cut)
    with pytest.raises(DmaError, match="told to fail"):
        guest.memory.attach(FaultyTarget(iommu, fail_map={number}))
    assert iommu.mappings() == []
    assert guest.picture() == before


def test_attach_within_a_budget(guest: Guest) -> None:
    for page in (0, 2, 9):
        guest.memory.convert(LOW + page * PAGE, PAGE, SHARED)
    before = guest.picture()
    target = RecordingTarget()
    with pytest.raises(MappingLimitError) as caught:
        guest.memory.attach(target, max_mappings=3)
    assert (caught.value.limit, caught.value.needed) == (3, 4)
    assert target.calls == []
    assert guest.picture() == before
    guest.memory.attach(target, max_mappings=4)


def test_detach_is_all_or_nothing(guest: Guest) -> None:
    for page in (0, 2, 9):
        guest.memory.convert(LOW + page * PAGE, PAGE, SHARED)
    for target, mapper in zip(guest.targets, guest.mappers, strict=True):
        before = guest.picture()
        for number in (1, 2, 3):
            target.fail_unmap = {target.unmap_calls + number}
            with pytest.raises(DmaError, match="told to fail"):
                guest.memory.detach(mapper)
            assert guest.picture() == before
        target.fail_unmap = ()
        guest.memory.detach(mapper)


# -- conversion ------------------------------------------------------------------------------------


def test_convert_there_and_back(guest: Guest) -> None:
    result = guest.memory.convert(LOW + PAGE, 3 * PAGE, SHARED)
    assert result == ConversionResult(LOW + PAGE, 3 * PAGE, SHARED, 3 * PAGE, 1 + 3, 0, 0)
    assert guest.vm.take_calls() == [("shared", LOW // PAGE + 1, 3)]
    result = guest.memory.convert(LOW, 4 * PAGE, PRIVATE)
    assert result == ConversionResult(LOW, 4 * PAGE, PRIVATE, 3 * PAGE, 0, 1 + 1, 0)
    assert guest.vm.take_calls() == [("private", LOW // PAGE, 4)]


@pytest.mark.parametrize("to", list(PageState))
def test_what_is_already_so(guest: Guest, to: PageState) -> None:
    guest.memory.convert(LOW, COUNT * PAGE, to)
    guest.vm.take_calls()
    before = guest.picture()
    result = guest.memory.convert(LOW + PAGE, 2 * PAGE, to)
    assert result == ConversionResult(LOW + PAGE, 2 * PAGE, to, 0, 0, 0, 0)
    assert guest.picture() == before
    assert guest.vm.calls == []


def test_two_adjacent_blocks_in_one_conversion(guest: Guest) -> None:
    low, high = RecordingListener("low"), RecordingListener("high")
    guest.low.discard_manager.register_listener(low, section(guest.low))
    guest.high.discard_manager.register_listener(high, section(guest.high))
    start = HIGH - 2 * PAGE
    result = guest.memory.convert(start, 5 * PAGE, SHARED)
    assert (result.changed_bytes, result.map_calls) == (5 * PAGE, 2 + 5)
    # One attribute call per piece, all of them before the first map.
    assert guest.vm.take_calls() == [("shared", start // PAGE, 2), ("shared", HIGH // PAGE, 3)]
    assert low.calls == [populate(6, 2)]
    assert high.calls == [populate(0, 3)]
    assert next(guest.memory.ranges(SHARED)) == (start, 5 * PAGE)
    guest.iommus[0].write(HIGH - 3, b"across")
    assert guest.low.read(COUNT * PAGE - 3, 3) + guest.high.read(0, 3) == b"across"
    result = guest.memory.convert(HIGH - PAGE, 2 * PAGE, PRIVATE)
    assert (result.changed_bytes, result.unmap_calls) == (2 * PAGE, 2 + 2)
    assert guest.vm.take_calls() == [("private", HIGH // PAGE - 1, 1), ("private", HIGH // PAGE, 1)]
    assert low.held == {6}
    assert high.held == {1, 2}


def test_one_attribute_call_per_piece_however_mixed_it_is(guest: Guest) -> None:
    for page in range(0, COUNT, 2):
        guest.memory.convert(LOW + page * PAGE, PAGE, SHARED)
    guest.vm.take_calls()
    assert guest.memory.convert(LOW, COUNT * PAGE, SHARED).changed_bytes == COUNT // 2 * PAGE
    assert guest.vm.take_calls() == [("shared", LOW // PAGE, COUNT)]


def test_the_order(guest: Guest) -> None:
    """To private: unmap, attribute, state, free. To shared: attribute, map, state, free."""
    order: list[str] = []
    attributes = attributes_of(guest.low)
    assert isinstance(guest.low.private, StandInPrivate)
    private = guest.low.private

    def note(what: str) -> None:
        state = "shared" if attributes.is_shared(0, PAGE) else "private"
        shared_used = bool(guest.low.allocated_bytes())
        private_used = bool(private.allocated_bytes())
        mapped = any(entry.iova == LOW for entry in guest.iommus[1].mappings())
        order.append(
            f"{what}: {state}, {'' if mapped else 'not '}mapped, shared side {shared_used},"
            f" private {private_used}"
        )

    listener = RecordingListener()
    guest.low.discard_manager.register_listener(listener, section(guest.low))
    listener.then = lambda call: note(call.verb)
    guest.vm.then = lambda call: note(f"attribute {call[0]}")
    guest.memory.observer = lambda event: note(f"event {event.after}")
    private.write(0, b"x")
    guest.memory.convert(LOW, PAGE, SHARED)
    guest.low.write(0, b"x")
    guest.memory.convert(LOW, PAGE, PRIVATE)
    assert order == [
        "attribute shared: private, not mapped, shared side False, private True",
        # Told after both targets: the second of them maps already.
        "populate: private, mapped, shared side False, private True",
        # Committed, and not freed yet.
        "event shared: shared, mapped, shared side False, private True",
        "discard: shared, not mapped, shared side True, private False",
        "attribute private: shared, not mapped, shared side True, private False",
        "event private: private, not mapped, shared side True, private False",
    ]
    assert guest.low.allocated_bytes() == 0


def hostile_ranges() -> list[tuple[object, object]]:
    good = LOW, PAGE
    ranges: list[tuple[object, object]] = [(bad, good[1]) for bad in HOSTILE]
    ranges += [(good[0], bad) for bad in (*HOSTILE, 0)]
    ranges += [
        (LOW, (1 << 64) - LOW + PAGE),
        (LOW + PAGE, (1 << 64) - PAGE),  # would wrap to just before where it began
        (LOW, 1 << 64),
        ((1 << 64) - PAGE, 2 * PAGE),
        ((1 << 64) - PAGE, PAGE),
        (0, PAGE),
        (LOW - PAGE, 2 * PAGE),
        (HIGH, (COUNT + 1) * PAGE),
        (LOW, (1 << 64) - LOW),
        (HIGH + 2 * COUNT * PAGE, PAGE),  # ordinary RAM
        (LOW, 10 * COUNT * PAGE),
    ]
    return ranges


@pytest.mark.parametrize("to", list(PageState))
@pytest.mark.parametrize(("gpa", "size"), hostile_ranges())
def test_hostile_conversions_are_refused_and_leave_everything_as_it_was(
    guest: Guest, gpa: int, size: int, to: PageState
) -> None:
    guest.memory.convert(LOW + 2 * PAGE, 2 * PAGE, SHARED)
    guest.vm.take_calls()
    before = guest.picture()
    with pytest.raises(UsageError) as caught:
        guest.memory.convert(gpa, size, to)
    assert len(str(caught.value)) < 500
    assert guest.picture() == before
    assert guest.vm.calls == []


@pytest.mark.parametrize("to", [None, True, False, 0, 1, "shared", "private", object()])
def test_conversion_to_what_is_no_state(guest: Guest, to: PageState) -> None:
    before = guest.picture()
    with pytest.raises(UsageError, match="is not a page state"):
        guest.memory.convert(LOW, PAGE, to)
    assert guest.picture() == before


def test_what_is_in_the_way_is_named(guest: Guest) -> None:
    with pytest.raises(UsageError, match=r"\[0x10f000, 0x111000\): nothing is mapped at 0x110000"):
        guest.memory.convert(HIGH + 7 * PAGE, 2 * PAGE, SHARED)
    with pytest.raises(UsageError, match="block 'ordinary' at 0x118000 has no private backing"):
        guest.memory.convert(HIGH + 2 * COUNT * PAGE, PAGE, SHARED)


@given(
    st.integers() | st.integers(0, 1 << 65),
    st.integers() | st.integers(0, 1 << 65),
    st.sampled_from(PageState),
)
def test_any_numbers_get_an_answer(gpa: int, size: int, to: PageState) -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        memory.map(block, LOW)
        try:
            result = memory.convert(gpa, size, to)
        except UsageError:
            assert attributes_of(block).shared_bytes == 0
        else:
            assert result.changed_bytes == (size if to is SHARED else 0)


@pytest.mark.parametrize("page", range(3))
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("to", list(PageState))
def test_a_conversion_that_fails_puts_everything_back_and_says_what_failed(
    guest: Guest, to: PageState, which: int, page: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    start, size = HIGH - 2 * PAGE, 4 * PAGE
    if to is PRIVATE:
        guest.memory.convert(start, size, SHARED)
    target = guest.targets[which]
    # The second target works page by page when it maps, so there are more calls to fail.
    number = 1 + page if (which, to) == (1, SHARED) else 1 + page % 2
    if to is SHARED:
        target.fail_map = {target.map_calls + number}
    else:
        target.fail_unmap = {target.unmap_calls + number}
    before = guest.picture()
    with pytest.raises(ConversionError) as caught:
        guest.memory.convert(start, size, to)
    error = caught.value
    assert (error.gpa, error.size, error.to) == (start, size, to)
    assert error.step == ("map" if to is SHARED else "unmap")
    assert error.target is target
    assert error.rolled_back is True
    assert isinstance(error.__cause__, DmaError)
    for part in (
        f"[{start:#x}, {start + size:#x})",
        error.step,
        repr(target),
        "nothing has changed",
    ):
        assert part in str(error)
    assert guest.picture() == before
    assert guest.memory.convert(start, size, to).changed_bytes == size


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("to", list(PageState))
def test_an_attribute_that_fails(guest: Guest, to: PageState, number: int) -> None:
    start, size = HIGH - 2 * PAGE, 4 * PAGE
    if to is PRIVATE:
        guest.memory.convert(start, size, SHARED)
        guest.vm.take_calls()
    calls = 0

    def refuse(_: tuple[str, int, int]) -> bool:
        nonlocal calls
        calls += 1
        return calls == number

    guest.vm.refuse = refuse
    before = guest.picture()
    with pytest.raises(ConversionError) as caught:
        guest.memory.convert(start, size, to)
    assert (caught.value.step, caught.value.target) == ("attribute", None)
    assert isinstance(caught.value.__cause__, OSError)
    assert guest.picture() == before
    if to is SHARED:
        # Attribute first: no device mapped anything that had to be unmapped again.
        assert all(target.map_calls == 0 or target.unmap_calls == 0 for target in guest.targets)


def test_a_listener_that_refuses_is_named_as_the_target(guest: Guest) -> None:
    listener = RecordingListener()
    guest.low.discard_manager.register_listener(listener, section(guest.low))
    listener.refuse_all("populate")
    before = guest.picture()
    with pytest.raises(ConversionError) as caught:
        guest.memory.convert(LOW, PAGE, SHARED)
    assert caught.value.target is listener
    assert isinstance(caught.value.__cause__, RefusalError)
    assert guest.picture() == before


def test_a_budget_refuses_before_anything_is_done(guest: Guest) -> None:
    guest.memory.attach(SoftIommu(), max_mappings=2)
    guest.memory.convert(LOW, PAGE, SHARED)
    guest.vm.take_calls()
    before = guest.picture()
    with pytest.raises(MappingLimitError) as caught:
        guest.memory.convert(HIGH - PAGE, 2 * PAGE, SHARED)  # one mapping in each block
    assert (caught.value.limit, caught.value.needed) == (2, 4)
    assert guest.vm.calls == []
    assert guest.picture() == before


def test_ctrl_c_is_put_back_and_still_ctrl_c(guest: Guest) -> None:
    listener = RecordingListener()
    guest.low.discard_manager.register_listener(listener, section(guest.low))

    def interrupt(_: object) -> None:
        listener.then = lambda _: None
        raise KeyboardInterrupt

    listener.then = interrupt
    before = guest.picture()
    with pytest.raises(KeyboardInterrupt) as caught:
        guest.memory.convert(LOW, PAGE, SHARED)
    assert "nothing has changed" in caught.value.__notes__[0]
    assert guest.picture() == before


def test_a_short_unmap_poisons_and_the_other_target_is_put_back(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    guest.memory.convert(LOW, 4 * PAGE, SHARED)
    guest.low.write(0, b"x" * (4 * PAGE))
    target = guest.targets[1]
    target.short_unmap = {target.unmap_calls + 1}
    with pytest.raises(PoisonedError) as caught:
        guest.memory.convert(LOW, 4 * PAGE, PRIVATE)
    assert caught.value.rolled_back is False
    assert caught.value.target is target
    assert guest.memory.poisoned
    assert [tuple(doubt) for doubt in guest.memory.in_doubt()] == [(LOW, 4 * PAGE, target)]
    # Nothing of the block is lost, and no attribute has changed.
    assert guest.iommus[0].read(LOW, 4 * PAGE) == b"x" * (4 * PAGE)
    assert guest.memory.state(LOW) is SHARED
    assert LOW // PAGE not in guest.vm.private
    assert guest.low.allocated_bytes() == 4 * PAGE
    assert "poisoned" in repr(guest.memory)
    # Detaching works, unmaps what is left and keeps the doubt; the other target was never in doubt.
    for mapper in guest.mappers:
        guest.memory.detach(mapper)
    assert [iommu.mappings() for iommu in guest.iommus] == [[], []]
    assert guest.memory.poisoned
    assert guest.memory.in_doubt()


def test_pages_that_stay_mapped_stay_shared(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    """The one target cannot let go of pages that the other refuses: a device may reach them."""
    caplog.set_level(logging.CRITICAL + 1)
    first, second = guest.targets
    second.fail_map = {second.map_calls + 1}
    first.short_unmap = {first.unmap_calls + 1}
    with pytest.raises(PoisonedError) as caught:
        guest.memory.convert(LOW, 4 * PAGE, SHARED)
    assert caught.value.target is second
    assert guest.memory.state(LOW) is SHARED
    assert LOW // PAGE not in guest.vm.private
    assert {tuple(doubt) for doubt in guest.memory.in_doubt()} == {
        (LOW, 4 * PAGE, first),
        (LOW, 4 * PAGE, second),
    }
    assert next(iter(guest.memory.ranges(SHARED))) == (LOW, 4 * PAGE)


# -- asking ----------------------------------------------------------------------------------------


def test_state(guest: Guest) -> None:
    guest.memory.convert(LOW + PAGE, PAGE, SHARED)
    assert guest.memory.state(LOW) is PRIVATE
    assert guest.memory.state(LOW + PAGE) is SHARED
    assert guest.memory.state(LOW + 2 * PAGE - 1) is SHARED
    assert guest.memory.state(LOW + 2 * PAGE) is PRIVATE
    assert guest.memory.state(HIGH + 2 * COUNT * PAGE) is SHARED  # ordinary RAM always is


@pytest.mark.parametrize(
    "gpa", [0, LOW - 1, HIGH + COUNT * PAGE, 1 << 64, (1 << 64) - 1, -1, None, True, "0", 1.5]
)
def test_state_of_what_is_not_there(guest: Guest, gpa: int) -> None:
    with pytest.raises(UsageError):
        guest.memory.state(gpa)


def test_ranges_join_across_blocks_and_leave_out_holes(guest: Guest) -> None:
    guest.memory.convert(HIGH - PAGE, 2 * PAGE, SHARED)
    ordinary = HIGH + 2 * COUNT * PAGE, COUNT * PAGE
    assert list(guest.memory.ranges(SHARED)) == [(HIGH - PAGE, 2 * PAGE), ordinary]
    assert list(guest.memory.ranges(PRIVATE)) == [
        (LOW, (COUNT - 1) * PAGE),
        (HIGH + PAGE, (COUNT - 1) * PAGE),
    ]


def test_ranges_of_parts_of_blocks_are_clipped() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(PAGE, 6 * PAGE, SHARED)
        memory.map(block, 0, offset=6 * PAGE, size=2 * PAGE)
        memory.map(block, LOW, offset=0, size=3 * PAGE)
        assert list(memory.ranges(SHARED)) == [(0, PAGE), (LOW + PAGE, 2 * PAGE)]
        assert list(memory.ranges(PRIVATE)) == [(PAGE, PAGE), (LOW, PAGE)]


@pytest.mark.parametrize("state", [None, "shared", 0, True])
def test_ranges_of_what_is_no_state(guest: Guest, state: PageState) -> None:
    with pytest.raises(UsageError, match="is not a page state"):
        guest.memory.ranges(state)


# -- several sources -------------------------------------------------------------------------------


def test_every_source_has_a_say(guest: Guest) -> None:
    source = PageSource(range(4))
    guest.low.discard_manager.add_source(source)
    device = VirtioMem(guest.low, 2 * PAGE)
    result = guest.memory.convert(LOW, COUNT * PAGE, SHARED)
    assert (result.changed_bytes, result.map_calls) == (COUNT * PAGE, 0)
    device.plug(2 * PAGE, 4 * PAGE)
    mapped = [(entry.iova, entry.size) for entry in guest.iommus[0].mappings()]
    assert mapped[0] == (LOW + 2 * PAGE, 2 * PAGE)
    source.populated.add(4)
    guest.low.discard_manager.notify_populate(source, 4 * PAGE, PAGE)
    result = guest.memory.convert(LOW, COUNT * PAGE, PRIVATE)
    assert (result.changed_bytes, result.unmap_calls) == (COUNT * PAGE, 2)
    assert guest.vm.private >= pages(LOW, COUNT * PAGE)


def test_listeners_of_a_third_party_follow_too(guest: Guest) -> None:
    listener = RecordingListener()
    guest.low.discard_manager.register_listener(listener, section(guest.low, 2, 4, gpa=5 * PAGE))
    guest.memory.convert(LOW, COUNT * PAGE, SHARED)
    guest.memory.convert(LOW + 3 * PAGE, COUNT * PAGE, PRIVATE)
    assert listener.calls == [populate(2, 4), discard(3, 3)]
    assert [part.gpa for part in listener.sections] == [5 * PAGE, 6 * PAGE]


# -- size ------------------------------------------------------------------------------------------


def test_the_cost_does_not_depend_on_the_size_of_the_guest() -> None:
    # One page in the middle of 16 TiB: anything that searched the rest would be seen in the number
    # of questions.
    memory, target = GuestMemory(), RecordingTarget()
    with RamBlock.create("huge", 16 * TIB, private="stand-in") as block:
        memory.map(block, 0)
        memory.attach(target)
        for to in (SHARED, PRIVATE):
            result = memory.convert(8 * TIB, PAGE, to)
            assert result.changed_bytes == PAGE
        assert target.calls == [("map", 8 * TIB, PAGE), ("unmap", 8 * TIB, PAGE)]
        assert memory.convert(0, 16 * TIB, SHARED).map_calls == 1
        assert memory.convert(4 * GIB, 8 * TIB, PRIVATE).unmap_calls == 1
        assert list(memory.ranges(SHARED)) == [
            (0, 4 * GIB),
            (8 * TIB + 4 * GIB, 8 * TIB - 4 * GIB),
        ]


def test_policies_per_target() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", COUNT * PAGE, private="stand-in") as block:
        memory.map(block, 0)
        by_run = memory.attach(SoftIommu())
        by_page = memory.attach(SoftIommu(), MappingPolicy.PAGE)
        memory.convert(0, COUNT * PAGE, SHARED)
        assert (by_run.entries, by_page.entries) == (1, COUNT)
        assert by_run.mapped_bytes == by_page.mapped_bytes == COUNT * PAGE


def test_a_private_page_is_out_of_reach(guest: Guest) -> None:
    guest.memory.convert(LOW, PAGE, SHARED)
    guest.iommus[0].write(LOW, b"x")
    guest.memory.convert(LOW, PAGE, PRIVATE)
    for iommu in guest.iommus:
        with pytest.raises(IommuFault):
            iommu.read(LOW, 1)
    guest.memory.convert(LOW, PAGE, SHARED)
    assert guest.iommus[0].read(LOW, 1) == b"\0"  # what was freed comes back as zeros


def test_a_conversion_over_two_sections_of_one_block() -> None:
    """Its pieces change the same page states, one after the other."""
    memory = GuestMemory()
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        attributes = attributes_of(block)
        memory.map(block, 0, size=4 * PAGE)
        memory.map(block, 4 * PAGE, offset=4 * PAGE)
        iommu = SoftIommu()
        memory.attach(iommu)
        assert memory.convert(2 * PAGE, 4 * PAGE, SHARED).changed_bytes == 4 * PAGE
        assert attributes.shared_bytes == 4 * PAGE
        memory.convert(3 * PAGE, PAGE, PRIVATE)
        assert memory.convert(0, 8 * PAGE, SHARED).changed_bytes == 5 * PAGE
        assert attributes.shared_bytes == 8 * PAGE
        memory.convert(0, 8 * PAGE, PRIVATE)
        assert (attributes.shared_bytes, iommu.mappings()) == (0, [])


@pytest.mark.parametrize("has_ranges", [False, True])
@pytest.mark.parametrize("first", ["the source", "the guest"])
def test_a_source_that_tells_late_leaves_nothing_stale(has_ranges: bool, first: str) -> None:
    """It has changed, and a conversion comes before its notify_discard."""
    memory = GuestMemory()
    with RamBlock.create("ram", 4 * PAGE, private="stand-in") as block:
        memory.map(block, 0)
        source = (PageSourceWithRanges if has_ranges else PageSource)(range(4))
        block.discard_manager.add_source(source)
        iommus = [SoftIommu(), SoftIommu(exact=True)]
        for iommu in iommus:
            memory.attach(iommu)
        memory.convert(0, 4 * PAGE, SHARED)
        source.populated -= {1, 2}
        if first == "the guest":
            memory.convert(PAGE, PAGE, PRIVATE)
            assert all(PAGE not in pages_of(iommu.mappings()) for iommu in iommus)
        block.discard_manager.notify_discard(source, PAGE, 2 * PAGE)
        memory.convert(PAGE, PAGE, PRIVATE)
        assert all(pages_of(iommu.mappings()) == {0, 3 * PAGE} for iommu in iommus)
        memory.convert(PAGE, PAGE, SHARED)
        assert all(pages_of(iommu.mappings()) == {0, 3 * PAGE} for iommu in iommus)
        assert not memory.poisoned


# -- parts that fail in unusual ways ---------------------------------------------------------------


def test_a_slot_that_the_vm_keeps_keeps_the_memory(guest: Guest) -> None:
    # A target refuses the new section, and then the VM does not take its slot back.
    guest.targets[0].fail_map = {guest.targets[0].map_calls + 1}
    guest.vm.refuse = lambda call: call[0] == "remove"
    with RamBlock.create("more", PAGE) as block:
        with pytest.raises(PoisonedError):
            guest.memory.map(block, 0)
        (doubt,) = (doubt for doubt in guest.memory.in_doubt() if doubt.target is guest.vm)
        assert (doubt.gpa, doubt.size) == (0, PAGE)
        backing = block.shared
    assert block.closed
    assert backing.read(0, 1) == b"\0", "closed, though the guest still sees it"


class ActsAndRaises(RecordingVm):
    """Does what a slot call asks for, and then raises an error that is no refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.then = self._raise
        self.verb = ""

    def add_memory_slot(self, section: RamSection) -> None:
        super().add_memory_slot(section)
        self._raise(("added", 0, 0))

    def remove_memory_slot(self, section: RamSection) -> None:
        super().remove_memory_slot(section)
        self._raise(("removed", 0, 0))

    def _raise(self, call: tuple[str, int, int]) -> None:
        if call[0] == self.verb:
            raise RuntimeError(f"behind {self.verb}")


def test_a_slot_call_that_raises_no_oserror_may_have_acted() -> None:
    vm = ActsAndRaises()
    memory = GuestMemory(vm)
    with RamBlock.create("ram", PAGE) as block:
        vm.verb = "added"
        with pytest.raises(RuntimeError, match="behind added"):
            memory.map(block, 0)
        assert (memory.sections, vm.slots, memory.poisoned) == ((), [], False)
        vm.verb = ""
        section = memory.map(block, 0)
        vm.verb = "removed"
        with pytest.raises(RuntimeError, match="behind removed"):
            memory.unmap(section)
        assert (memory.sections, vm.slots, memory.poisoned) == ((section,), [section], False)
        vm.verb = ""


def test_a_vm_that_does_not_take_attributes_back_does_not_stop_a_close(guest: Guest) -> None:
    def fail(call: tuple[str, int, int]) -> None:
        if call[0] == "shared":
            raise RuntimeError("the VM is gone")

    guest.vm.then = fail
    guest.low.close()
    guest.vm.then = lambda _: None
    assert guest.low.closed
    assert [section.block.name for section in guest.memory.sections] == ["high", "ordinary"]
    assert not guest.memory.poisoned


class UnprintableError(Exception):
    def __repr__(self) -> str:
        raise AttributeError("no such thing")


def test_an_error_that_cannot_be_printed_poisons_like_any_other(guest: Guest) -> None:
    guest.memory.convert(LOW, PAGE, SHARED)

    def fail(call: tuple[str, int, int]) -> None:
        raise UnprintableError

    guest.vm.then = fail
    with pytest.raises(PoisonedError):
        guest.memory.convert(LOW, PAGE, PRIVATE)
    guest.vm.then = lambda _: None
    assert guest.memory.poisoned


def test_an_observer_that_raises_anything_changes_no_outcome(guest: Guest) -> None:
    def leave(_: object) -> None:
        raise SystemExit("the observer wants to leave")

    guest.memory.convert(LOW, PAGE, SHARED)
    guest.low.write(0, b"secret")
    guest.memory.observer = leave
    guest.memory.convert(LOW, PAGE, PRIVATE)
    assert guest.low.shared.allocated_bytes() == 0
    vm = RecordingVm()
    guest.memory.reset(vm)
    guest.memory.observer = None
    guest.memory.convert(LOW, PAGE, SHARED)
    assert ("shared", LOW // PAGE, 1) in vm.calls


def test_pending_frees_of_a_block_that_closes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    # The descriptor's number may belong to another file by then.
    block = RamBlock.create("ram", PAGE, private="stand-in")
    memory = GuestMemory()
    memory.map(block, 0)
    run = block.discard_manager.run

    def late(operation: str, *rest: Any, **options: Any) -> Any:
        if operation == "free_pending":
            block.close()
        return run(operation, *rest, **options)

    monkeypatch.setattr(block.discard_manager, "run", late)
    with pytest.raises(UsageError, match="is closed"):
        block.free_pending()
