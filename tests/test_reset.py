"""A guest's reboot: nothing of the old guest is left, for devices or for the new guest."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from doubles import PAGE, RecordingListener, RecordingVm, discard, section
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import IommuFault, PoisonedError, UsageError
from ramblock.hostmem import StandInPrivate
from ramblock.testing import FaultyTarget, SimulatedInPlace

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 8
SIZE = COUNT * PAGE
ROM = 4 * SIZE


@dataclass
class Guest:
    """
    Two confidential blocks, one with virtio-mem; ordinary RAM; a device behind each of two IOMMUs.
    """

    memory: GuestMemory
    vm: RecordingVm
    ram: RamBlock
    hotplug: RamBlock
    rom: RamBlock
    device: VirtioMem
    iommus: list[SoftIommu]
    targets: list[FaultyTarget]
    listener: RecordingListener

    @property
    def mapped(self) -> list[set[int]]:
        return [
            {
                page
                for entry in iommu.mappings()
                for page in range(entry.iova // PAGE, (entry.iova + entry.size) // PAGE)
            }
            for iommu in self.iommus
        ]

    def picture(self) -> object:
        return (
            list(self.memory.ranges(SHARED)),
            self.mapped,
            set(self.vm.private),
            set(self.vm.slots),
            self.device.plugged_size,
            set(self.listener.held),
            [self.private(block).allocated_bytes() for block in (self.ram, self.hotplug)],
            [block.allocated_bytes() for block in (self.ram, self.hotplug, self.rom)],
        )

    @staticmethod
    def private(block: RamBlock) -> StandInPrivate:
        assert isinstance(block.private, StandInPrivate)
        return block.private


@pytest.fixture
def guest() -> Iterator[Guest]:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    ram = RamBlock.create("ram", SIZE, private="stand-in")
    hotplug = RamBlock.create("hotplug", SIZE, private="stand-in")
    rom = RamBlock.create("rom", 2 * PAGE)
    memory.map(ram, 0)
    # A part, whose borders cut blocks of the device.
    memory.map(hotplug, 2 * SIZE, offset=PAGE, size=5 * PAGE)
    memory.map(rom, ROM, readonly=True)
    device = VirtioMem(hotplug, 2 * PAGE)
    device.plug(0, 6 * PAGE)
    iommus = [SoftIommu(), SoftIommu(exact=True)]
    targets = [FaultyTarget(iommu) for iommu in iommus]
    for target in targets:
        memory.attach(target)
    listener = RecordingListener()
    ram.discard_manager.register_listener(listener, section(ram))
    memory.convert(PAGE, 3 * PAGE, SHARED)
    memory.convert(2 * SIZE, 2 * PAGE, SHARED)
    for block in (ram, hotplug):
        block.write(0, b"shared" * PAGE)
        Guest.private(block).write(0, b"secret" * PAGE)
    rom.write(0, b"firmware")
    yield Guest(memory, vm, ram, hotplug, rom, device, iommus, targets, listener)
    for block in (ram, hotplug, rom):
        block.close()


def check_reset(guest: Guest, vm: RecordingVm) -> None:
    assert list(guest.memory.ranges(SHARED)) == [(ROM, 2 * PAGE)]
    firmware = {ROM // PAGE, ROM // PAGE + 1}
    assert guest.mapped == [firmware, firmware]
    assert vm.private == {*range(COUNT), *range(2 * COUNT, 2 * COUNT + 5)}
    assert {part.gpa for part in vm.slots} == {0, 2 * SIZE, ROM}
    assert guest.device.plugged_size == 0
    assert guest.listener.held == set()
    assert guest.listener.wrong == []
    for block in (guest.ram, guest.hotplug):
        assert block.allocated_bytes() == 0
        assert guest.private(block).allocated_bytes() == 0
        assert guest.private(block).read(0, SIZE) == bytes(SIZE)
    assert guest.rom.read(0, 8) == b"firmware"
    assert not guest.memory.poisoned


def test_nothing_of_the_old_guest_is_left(guest: Guest) -> None:
    guest.listener.take_calls()
    guest.memory.reset()
    check_reset(guest, guest.vm)
    assert guest.listener.take_calls() == [discard(1, 3)]
    for iommu in guest.iommus:
        with pytest.raises(IommuFault):
            iommu.read(PAGE, 1)
        assert iommu.read(ROM, 8) == b"firmware"
    # The new guest boots like the old one.
    guest.device.plug(0, 2 * PAGE)
    guest.memory.convert(0, SIZE, SHARED)
    guest.memory.convert(2 * SIZE, 5 * PAGE, SHARED)
    assert guest.mapped[0] == {*range(COUNT), 2 * COUNT, ROM // PAGE, ROM // PAGE + 1}
    guest.memory.reset()
    guest.memory.reset()
    check_reset(guest, guest.vm)


def test_a_new_vm_has_its_attributes_before_it_has_slots(guest: Guest) -> None:
    old_calls = list(guest.vm.calls)
    vm = RecordingVm()
    guest.memory.reset(vm)
    check_reset(guest, vm)
    verbs = [verb for verb, _, _ in vm.calls]
    assert verbs == ["private", "private", "add", "add", "add"]
    assert guest.vm.calls == old_calls  # it does not run any more
    guest.memory.convert(0, PAGE, SHARED)
    assert 0 not in vm.private


def test_new_private_sides_are_taken_over(guest: Guest) -> None:
    old = guest.private(guest.ram)
    with StandInLike(SIZE) as new:
        guest.vm.calls.clear()
        guest.memory.reset(private={guest.ram: new.backing})
        assert guest.ram.private is new.backing
        # Its slot was there with the old side; no other was touched.
        assert [call for call in guest.vm.calls if call[0] in {"add", "remove"}] == [
            ("remove", 0, COUNT),
            ("add", 0, COUNT),
        ]
        check_reset(guest, guest.vm)
        with pytest.raises(OSError, match="Bad file descriptor"):
            old.allocated_bytes()  # it was the block's own, and is closed
        new.backing.write(0, b"new guest")
        guest.memory.convert(0, PAGE, SHARED)
        assert new.backing.allocated_bytes() == 0  # freed like any other
        guest.memory.reset()
        check_reset(guest, guest.vm)


class StandInLike:
    """A private backing of the caller's."""

    def __init__(self, size: int) -> None:
        self.backing = StandInPrivate("new", size)

    def __enter__(self) -> StandInLike:
        return self

    def __exit__(self, *_: object) -> None:
        self.backing.close()


def test_a_backing_of_the_callers_is_emptied_and_left_open() -> None:
    with StandInLike(SIZE) as old, StandInLike(SIZE) as new:
        memory = GuestMemory()
        with RamBlock.create("ram", SIZE, private=old.backing) as block:
            memory.map(block, 0)
            old.backing.write(0, b"secret")
            memory.reset(private={block: new.backing})
            assert old.backing.allocated_bytes() == 0
            assert old.backing.read(0, 6) == bytes(6)


def test_an_old_side_that_is_not_emptied_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandInLike(SIZE) as old, StandInLike(SIZE) as new:
        memory = GuestMemory()
        with RamBlock.create("ram", SIZE, private=old.backing) as block:
            memory.map(block, 0)

            def refuse(offset: int, size: int) -> None:
                raise OSError(errno.EIO, "no")

            monkeypatch.setattr(old.backing, "discard", refuse)
            assert memory.reset(private={block: new.backing}) == SIZE
            assert block.private is new.backing
            assert "the old private side is not emptied" in caplog.text


def test_in_place_the_content_goes_too() -> None:
    iommu = SoftIommu()
    backing = SimulatedInPlace("ram", SIZE, pinned_by=[iommu])
    memory = GuestMemory()
    with RamBlock.create("ram", SIZE, private=backing) as block:
        memory.map(block, 0)
        memory.attach(iommu)
        memory.convert(0, 2 * PAGE, SHARED)
        iommu.write(0, b"old")
        memory.reset()
        assert list(backing.private_ranges()) == [(0, SIZE)]
        assert iommu.mappings() == []
        assert backing.read_as_guest(0, SIZE) == bytes(SIZE)


REFUSALS: dict[str, Callable[[Guest], None]] = {
    "first target": lambda guest: setattr(guest.targets[0], "fail_unmap", range(1, 1000)),
    "second target": lambda guest: setattr(guest.targets[1], "fail_unmap", range(1, 1000)),
    "listener": lambda guest: guest.listener.refuse_all("discard"),
    "attribute": lambda guest: setattr(guest.vm, "refuse", lambda call: call[0] == "private"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_puts_everything_back(guest: Guest, name: str) -> None:
    before = guest.picture()
    REFUSALS[name](guest)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever class it was
        guest.memory.reset()
    for target in guest.targets:
        target.fail_unmap = ()
    assert not guest.memory.poisoned
    assert guest.picture() == before
    guest.listener.refuse_nothing()
    guest.vm.refuse = lambda _: False
    guest.memory.reset()
    check_reset(guest, guest.vm)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_new_vm_that_refuses_is_not_taken(guest: Guest, number: int) -> None:
    before = guest.picture()
    vm = RecordingVm()
    left = number

    def refuse(call: tuple[str, int, int]) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    vm.refuse = refuse
    with StandInLike(SIZE) as new:
        with pytest.raises(OSError, match="the VM refuses"):
            guest.memory.reset(vm, {guest.ram: new.backing})
        assert guest.ram.private is not new.backing
    assert (vm.slots, vm.private) == ([], set())
    assert guest.picture() == before
    guest.memory.reset()
    check_reset(guest, guest.vm)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_new_vm_that_cannot_be_put_back_does_no_harm(guest: Guest, number: int) -> None:
    """It is not taken, so that whatever it has been told is of no account."""
    before = guest.picture()
    vm = RecordingVm()
    left = number

    def refuse(call: tuple[str, int, int]) -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    vm.refuse = refuse
    with StandInLike(SIZE) as new:
        with pytest.raises(OSError, match="the VM refuses"):
            guest.memory.reset(vm, {guest.ram: new.backing})
        assert not guest.memory.poisoned
        assert guest.picture() == before
        guest.memory.reset()
        check_reset(guest, guest.vm)


@pytest.mark.parametrize("verb", ["add", "remove"])
def test_a_slot_that_was_refused_is_not_put_back(
    guest: Guest, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was done, and a VM may refuse to undo that."""
    before = guest.picture()
    refused: list[str] = []

    def refuse(call: tuple[str, int, int]) -> bool:
        if call[0] == verb and not refused:
            refused.append(verb)
            return True
        there = any(part.gpa == call[1] * PAGE for part in guest.vm.slots)
        return (call[0] == "add" and there) or (call[0] == "remove" and not there)

    def remove(part: RamSection) -> None:
        guest.vm._hear("remove", part.gpa, part.size)
        guest.vm.slots.remove(part)

    guest.vm.refuse = refuse
    monkeypatch.setattr(guest.vm, "remove_memory_slot", remove)
    with StandInLike(SIZE) as new:
        with pytest.raises(OSError, match="the VM refuses"):
            guest.memory.reset(private={guest.ram: new.backing})
        assert refused
        assert not guest.memory.poisoned
        assert guest.picture() == before
        guest.memory.reset()
    check_reset(guest, guest.vm)


def wrong(guest: Guest) -> list[set[int]]:
    """Per IOMMU: guest pages that are mapped and not populated, or populated and not mapped."""
    populated = {
        page
        for block in (guest.ram, guest.hotplug, guest.rom)
        for part in guest.memory.sections
        if part.block is block
        for run in block.discard_manager.populated(part)
        for page in range(run.gpa // PAGE, run.gpa_end // PAGE)
    }
    return [mapped ^ populated for mapped in guest.mapped]


def in_doubt(guest: Guest) -> list[set[int]]:
    return [
        {
            page
            for gpa, size, who in guest.memory.in_doubt()
            for page in range(gpa // PAGE, (gpa + size) // PAGE)
            if who is target
        }
        for target in guest.targets
    ]


def test_a_slot_that_does_not_come_back_leaves_its_block_unmapped_and_in_doubt(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    guest.vm.refuse = lambda call: call[0] == "add"
    with StandInLike(SIZE) as new:
        with pytest.raises(PoisonedError, match="reset: the memory is poisoned"):
            guest.memory.reset(private={guest.ram: new.backing})
        assert guest.ram.private is not new.backing
        shared = {1, 2, 3}
        assert wrong(guest) == [shared, shared]
        assert in_doubt(guest) == [shared, shared]
        # The other block had nothing to do with it.
        assert 2 * COUNT in guest.mapped[0]
        assert guest.private(guest.ram).read(0, 6) == b"secret"


def test_a_slot_that_stays_with_a_new_side_leaves_its_block_private(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    guest.vm.refuse = lambda call: (
        call[:2] == ("add", 2 * COUNT) or (call[0] == "remove" and guest.ram.private is new.backing)
    )
    with StandInLike(SIZE) as new, StandInLike(SIZE) as other:
        with pytest.raises(PoisonedError, match="reset: the memory is poisoned"):
            guest.memory.reset(private={guest.ram: new.backing, guest.hotplug: other.backing})
        # The guest sees the new side, so that nothing of the block is mapped or called shared.
        assert guest.ram.private is new.backing
        assert guest.memory.state(PAGE) is PRIVATE
        assert [pages & set(range(COUNT)) for pages in guest.mapped] == [set(), set()]
        for pages, doubted in zip(wrong(guest), in_doubt(guest), strict=True):
            assert pages <= doubted


def test_a_short_unmap_poisons_and_nothing_is_freed(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    target = guest.targets[0]
    target.short_unmap = {target.unmap_calls + 1}
    with pytest.raises(PoisonedError, match="reset: the memory is poisoned"):
        guest.memory.reset()
    assert guest.memory.in_doubt()
    assert guest.private(guest.ram).read(0, 6) == b"secret"
    assert guest.ram.read(0, 6) == b"shared"
    with pytest.raises(PoisonedError):
        guest.memory.reset()


def test_wrong_parts_are_refused(guest: Guest) -> None:
    before = guest.picture()
    with RamBlock.create("other", SIZE, private="stand-in") as other, StandInLike(PAGE) as small:
        for vm, private, message in (
            ("a VM", None, "is not a VM"),
            (None, {other: small.backing}, "takes no new private side"),
            (None, {guest.rom: small.backing}, "takes no new private side"),
            (None, {guest.ram: small.backing}, "private backing only"),
            (None, {guest.ram: object()}, "is not a private backing"),
        ):
            with pytest.raises(UsageError, match=message):
                guest.memory.reset(vm, private)  # type: ignore[arg-type]  # hostile on purpose
    assert guest.picture() == before


def test_it_is_told_to_the_observer(guest: Guest) -> None:
    told: list[tuple[str, int, int, str, str]] = []
    guest.memory.observer = lambda event: told.append(
        (event.block, event.offset, event.size, event.before, event.after)
    )
    guest.memory.reset()
    assert told == [
        ("ram", 0, SIZE, "mixture", "private"),
        ("hotplug", 0, SIZE, "mixture", "private"),
    ]


def test_a_guest_without_a_vm_and_one_with_nothing() -> None:
    GuestMemory().reset()
    memory = GuestMemory()
    with RamBlock.create("ram", SIZE) as block:
        memory.map(block, 0)
        memory.attach(SoftIommu(), MappingPolicy.PAGE)
        memory.reset()
        assert memory.mappers[0].entries == COUNT
        assert memory.sections == (RamSection(block, 0, SIZE),)
