"""
Memory slots by section, on a kernel that is played by a dictionary.

What KVM itself says to slots is in test_vm.py; here it is what the table makes of it, and of Ctrl-C
around a call.
"""

import errno
import os
from collections.abc import Iterator
from ctypes import Array, Structure, c_char

import pytest

from doubles import PAGE, section
from ramblock import RamBlock, RamSection
from ramblock.kvm import GuestMemfd, GuestMemfdFlags
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.slots import SlotTable
from ramblock.uapi.kvm import KvmUserspaceMemoryRegion, KvmUserspaceMemoryRegion2

PAGES = 4
READONLY, GUEST_MEMFD = 2, 4


class FakeVm(Descriptor):
    """Slots as kvm_set_memory_region() keeps them (virt/kvm/kvm_main.c)."""

    def __init__(self) -> None:
        super().__init__(os.memfd_create("vm"), "VM")
        # By number: flags, guest address, size, host address, offset in the guest_memfd.
        self.slots: dict[int, tuple[int, int, int, int, int]] = {}
        self.calls = 0
        self.refuse = 0
        self.interrupt_before = self.interrupt_after = False

    def call(self, request: int, what: str, argument: int | Structure | Array[c_char] = 0) -> int:
        if self.interrupt_before:
            self.interrupt_before = False
            raise KeyboardInterrupt
        self.calls += 1
        assert isinstance(argument, KvmUserspaceMemoryRegion | KvmUserspaceMemoryRegion2)
        if self.refuse:
            raise OSError(self.refuse, what)
        self._set(argument)
        if self.interrupt_after:
            self.interrupt_after = False
            raise KeyboardInterrupt
        return 0

    def _set(self, region: KvmUserspaceMemoryRegion | KvmUserspaceMemoryRegion2) -> None:
        if not region.memory_size:
            if region.slot not in self.slots:
                raise OSError(errno.EINVAL, "no such slot")
            del self.slots[region.slot]
            return
        offset = getattr(region, "guest_memfd_offset", 0)
        new = (
            *(region.flags, region.guest_phys_addr),
            *(region.memory_size, region.userspace_addr, offset),
        )
        old = self.slots.get(region.slot)
        if old is not None and (region.flags & GUEST_MEMFD or old != new):
            raise OSError(errno.EINVAL, "a slot cannot be changed like that")
        self.slots[region.slot] = new


@pytest.fixture
def vm() -> Iterator[FakeVm]:
    vm = FakeVm()
    yield vm
    vm.close()


@pytest.fixture
def table(vm: FakeVm) -> SlotTable:
    return SlotTable(vm, 3)


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", PAGES * PAGE) as block:
        yield block


class FakeGuestMemfd(GuestMemfd):
    def __init__(self) -> None:
        descriptor = Descriptor(os.memfd_create("private"), "guest_memfd")
        super().__init__(descriptor, PAGES * PAGE, GuestMemfdFlags(0), None)


@pytest.fixture(params=["ordinary", "confidential"])
def private(request: pytest.FixtureRequest) -> Iterator[GuestMemfd | None]:
    if request.param == "ordinary":
        yield None
    else:
        with FakeGuestMemfd() as private:
            yield private


def test_slot_says_where_the_memory_is(vm: FakeVm, table: SlotTable, block: RamBlock) -> None:
    table.add(RamSection(block, PAGE, 2 * PAGE, 0x5000, readonly=True), None)
    table.add(section(block, gpa=0x10_0000), None)
    assert vm.slots == {
        0: (READONLY, 0x5000, 2 * PAGE, block.address + PAGE, 0),
        1: (0, 0x10_0000, PAGES * PAGE, block.address, 0),
    }


def test_slot_with_guest_memfd_says_where_both_sides_are(
    vm: FakeVm, table: SlotTable, block: RamBlock
) -> None:
    with FakeGuestMemfd() as private:
        table.add(RamSection(block, PAGE, 2 * PAGE, 0x5000), private)
    assert vm.slots == {0: (GUEST_MEMFD, 0x5000, 2 * PAGE, block.address + PAGE, PAGE)}


def test_numbers_are_used_again(vm: FakeVm, table: SlotTable, block: RamBlock) -> None:
    sections = [section(block, page, 1, gpa=page * PAGE) for page in range(4)]
    for part in sections[:3]:
        table.add(part, None)
    with pytest.raises(OSError, match="all 3 memory slots are used") as caught:
        table.add(sections[3], None)
    assert caught.value.errno == errno.ENOSPC
    table.remove(sections[1])
    table.add(sections[3], None)
    assert [vm.slots[number][1] for number in range(3)] == [0, 3 * PAGE, 2 * PAGE]


def test_adding_and_removing_twice_is_once(
    vm: FakeVm, table: SlotTable, block: RamBlock, private: GuestMemfd | None
) -> None:
    part = section(block)
    table.remove(part)
    assert vm.calls == 0
    table.add(part, private)
    table.add(part, private)
    assert vm.calls == 1
    table.remove(part)
    table.remove(part)
    assert vm.calls == 2
    assert vm.slots == {}


def test_refused_addition_leaves_no_trace(vm: FakeVm, table: SlotTable, block: RamBlock) -> None:
    vm.refuse = errno.ENOMEM
    with pytest.raises(OSError, match="slot 0 for"):
        table.add(section(block), None)
    vm.refuse = 0
    table.remove(section(block))
    assert vm.calls == 1  # nothing to remove
    table.add(section(block), None)
    assert len(vm.slots) == 1


def test_refused_removal_leaves_the_slot(vm: FakeVm, table: SlotTable, block: RamBlock) -> None:
    table.add(section(block), None)
    vm.refuse = errno.EINVAL
    with pytest.raises(OSError, match="removing slot 0"):
        table.remove(section(block))
    vm.refuse = 0
    assert len(vm.slots) == 1
    table.remove(section(block))
    assert vm.slots == {}


def test_slots_of_a_closed_vm_are_forgotten(vm: FakeVm, table: SlotTable, block: RamBlock) -> None:
    table.add(section(block), None)
    vm.close()
    calls = vm.calls
    table.remove(section(block))
    assert vm.calls == calls
