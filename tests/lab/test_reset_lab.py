"""
A reset on a real kernel: guest_memfd, attributes and slots of KVM, an IOMMU with a device behind
it.

QEMU 11.1.3 leaves its bitmap and mappings at a confidential reset; these tests say what has to be.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvm_vms import NotedVm
from lab_devices import BOUNCE, Way, open_rig, wait_for_fault
from lab_faults import FaultLog
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.guest_program import Command, GuestProgram, IdleEvent, Operation, Status, choose_call
from ramblock.kvm import GuestMemfd, Kvm, KvmVm, VmType
from ramblock.units import MIB, PAGE_SIZE
from ramblock.vfio import BouncePage

SIZE = 4 * MIB
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
OLD = 0x5EC2_E700


class Stack:
    """One software-protected VM after the other on the same memory, and edu behind one target."""

    def __init__(self, resources: ExitStack, way: Way) -> None:
        self.resources = resources
        self.kvm = resources.enter_context(Kvm())
        self.vm, self.private = self.new_vm()
        self.noted = NotedVm(self.vm)
        self.memory = GuestMemory(self.noted)
        self.block = resources.enter_context(RamBlock.create("ram", SIZE, private=self.private))
        self.memory.map(self.block, 0)
        rig = resources.enter_context(open_rig(way))
        self.rig = rig
        self.bounce = resources.enter_context(BouncePage(rig.target, BOUNCE))
        self.mapper = self.memory.attach(rig.target)
        resources.callback(self.memory.detach, self.mapper)
        self.faults = FaultLog()
        resources.callback(self.faults.close)
        self.program = self.boot(self.vm)

    def new_vm(self) -> tuple[KvmVm, GuestMemfd]:
        vm = self.resources.enter_context(self.kvm.create_vm(VmType.SW_PROTECTED))
        assert vm.enforces_attributes
        return vm, self.resources.enter_context(vm.create_guest_memfd(SIZE))

    def boot(self, vm: KvmVm) -> GuestProgram:
        return self.resources.enter_context(
            GuestProgram(
                vm,
                self.kvm.supported_cpuid(),
                base=SIZE,
                reach=[(0, SIZE)],
                call=choose_call(self.kvm),
            )
        )

    def guest(self, command: Command) -> None:
        self.program.put(command)
        event = self.program.run()
        assert isinstance(event, IdleEvent), event
        (result,) = self.program.results()
        assert result.status == Status.DONE, (hex(result.found), hex(result.address))

    def fill(self, gpa: int, size: int, value: int) -> None:
        self.guest(Command(Operation.FILL, gpa, size, value, PAGE_SIZE, 1))

    def check(self, gpa: int, size: int, value: int, step: int = 1) -> None:
        self.guest(Command(Operation.CHECK, gpa, size, value, PAGE_SIZE, step))

    def live(self) -> None:
        """The old guest: private words on all pages, then some shared, and a device that writes."""
        self.fill(0, SIZE, OLD)
        self.memory.convert(MIB, MIB, SHARED)
        self.fill(MIB, MIB, OLD)
        self.rig.edu.write_to_ram(MIB, b"device!!", self.bounce)
        assert self.block.read(MIB, 8) == b"device!!"
        assert self.private.allocated_bytes() in (SIZE - MIB, None)

    def is_out_of_reach(self, gpa: int) -> None:
        """A device's write is refused by the IOMMU, and changes nothing."""
        wait_for_fault(
            self.faults, lambda: self.rig.edu.write_to_ram(gpa, b"too late", self.bounce)
        )

    def is_empty(self) -> None:
        assert list(self.memory.ranges(SHARED)) == []
        assert (self.mapper.entries, self.mapper.mapped_bytes) == (0, 0)
        assert self.block.allocated_bytes() == 0
        self.is_out_of_reach(MIB)
        # The new guest finds zeros everywhere, on private pages, without a conversion.
        self.check(0, SIZE, 0, step=0)
        assert self.block.allocated_bytes() == 0


@pytest.fixture(params=Way, ids=lambda way: way.value)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with ExitStack() as resources:
        yield Stack(resources, request.param)


def test_the_same_vm_is_reset(stack: Stack) -> None:
    stack.live()
    assert stack.memory.reset() == 0
    assert stack.private.allocated_bytes() in (0, None)
    stack.is_empty()
    stack.live()


def test_vm_and_guest_memfd_are_recreated(stack: Stack) -> None:
    """As QEMU does at a confidential reset."""
    stack.live()
    old = stack.private
    stack.program.close()
    vm, private = stack.new_vm()
    noted = NotedVm(vm)
    assert stack.memory.reset(noted, {stack.block: private}) == 0
    # Private before the guest could see a page.
    assert noted.take_calls() == [("private", 0, SIZE), ("add", 0, SIZE)]
    assert old.allocated_bytes() in (0, None)
    stack.vm.close()
    old.close()
    stack.vm, stack.private = vm, private
    stack.program = stack.boot(vm)
    stack.is_empty()
    stack.live()


def test_a_vm_that_cannot_have_the_old_side_is_refused(stack: Stack) -> None:
    stack.live()
    vm, _ = stack.new_vm()
    with pytest.raises(ValueError, match="belongs to another VM"):
        stack.memory.reset(vm)
    assert not stack.memory.poisoned
    # The old guest goes on as if nothing had been.
    stack.check(0, MIB, OLD)
    stack.rig.edu.write_to_ram(MIB, b"goes on!", stack.bounce)
    assert stack.block.read(MIB, 8) == b"goes on!"
