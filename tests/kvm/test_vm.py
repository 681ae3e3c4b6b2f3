"""A VM of the real kernel, as the ``vm`` of a guest memory."""

import errno
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from doubles import PAGE, section
from kvm_guests import (
    enter_flat_32bit,
    jump_back,
    load,
    run_through,
    write_code,
    write_port,
    written,
)
from kvm_vms import NotedVm
from ramblock import GuestMemory, PageState, RamBlock, RamSection
from ramblock.errors import UsageError
from ramblock.guest import MemorySlots
from ramblock.kvm import Capability, GuestMemfdFlags, IoExit, Kvm, KvmVm, MmioExit, VmType
from require import require_kvm

pytestmark = require_kvm

PAGES = 16
SIZE = PAGES * PAGE
RAM = 0x40_0000
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED


@pytest.fixture
def block(vm: KvmVm) -> Iterator[RamBlock]:
    """A block with the kernel's guest_memfd."""
    if not vm.capability(Capability.KVM_CAP_GUEST_MEMFD):
        pytest.skip(
            "the kernel has no guest_memfd (Linux 6.8 with private memory, from 6.18 always)"
        )
    with (
        vm.create_guest_memfd(SIZE) as private,
        RamBlock.create("ram", SIZE, private=private) as block,
    ):
        yield block


# -- attributes ------------------------------------------------------------------------------------


def test_it_has_slots(vm: KvmVm) -> None:
    assert isinstance(vm, MemorySlots)


def test_attributes_of_an_ordinary_vm_are_tracked_and_not_enforced(
    vm: KvmVm, block: RamBlock
) -> None:
    assert vm.type is VmType.DEFAULT
    assert not vm.enforces_attributes
    memory = GuestMemory(vm)
    memory.map(block, RAM)
    memory.convert(RAM, PAGE, SHARED)
    assert list(memory.ranges(SHARED)) == [(RAM, PAGE)]


@pytest.mark.parametrize(
    ("gpa", "size"), [(1, PAGE), (0, 0), (0, PAGE + 1), ((1 << 64) - PAGE, 2 * PAGE)]
)
def test_bad_range_of_attributes_is_refused(vm: KvmVm, gpa: int, size: int) -> None:
    with pytest.raises(UsageError, match="memory attributes"):
        vm.set_memory_attributes(gpa, size, private=True)


# -- slots -----------------------------------------------------------------------------------------


def test_attributes_come_before_the_slot(vm: KvmVm, block: RamBlock) -> None:
    noted = NotedVm(vm)
    memory = GuestMemory(noted)
    placed = memory.map(block, RAM)
    assert noted.take_calls() == [("private", RAM, SIZE), ("add", RAM, SIZE)]
    memory.unmap(placed)
    assert noted.take_calls() == [("remove", RAM, SIZE), ("shared", RAM, SIZE)]


def test_what_is_shared_already_is_shared_before_the_slot(vm: KvmVm, block: RamBlock) -> None:
    assert block.attributes is not None
    block.attributes.state_change(PAGE, 2 * PAGE, SHARED)
    noted = NotedVm(vm)
    GuestMemory(noted).map(block, RAM)
    assert noted.take_calls() == [
        ("private", RAM, SIZE),
        ("shared", RAM + PAGE, 2 * PAGE),
        ("add", RAM, SIZE),
    ]


def test_vcpu_that_looks_at_once_sees_the_slot_when_it_is_there(
    kvm: Kvm, vm: KvmVm, block: RamBlock
) -> None:
    """
    A vCPU reads the page all the time: ones as long as there is nothing, then what is in it, and
    nothing in between.
    """
    block.write(0, b"RAM!")
    noted = NotedVm(vm)
    memory = GuestMemory(noted)
    with RamBlock.create("code", PAGE) as code:
        memory.map(code, 0)
        write_code(
            code, 0, read := load(RAM), show := write_port(0x10), jump_back(len(read + show))
        )
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        enter_flat_32bit(vcpu, 0)
        seen: list[int] = []
        looked = threading.Event()

        def look() -> None:
            while not seen or seen[-1] == 0xFFFF_FFFF:
                exit = run_through(vcpu)
                if isinstance(exit, IoExit):
                    seen.append(written(exit))
                    looked.set()
                else:
                    assert isinstance(exit, MmioExit)

        thread = threading.Thread(target=look)
        thread.start()
        assert looked.wait(30)
        memory.map(block, RAM)
        thread.join(30)
        assert set(seen) == {0xFFFF_FFFF, int.from_bytes(b"RAM!", "little")}
        vcpu.close()


def test_slot_that_the_kernel_refuses_puts_the_section_back(vm: KvmVm, block: RamBlock) -> None:
    noted = NotedVm(vm)
    with RamBlock.create("in the way", PAGE) as other:
        in_the_way = RamSection(other, 0, PAGE, RAM + PAGE)
        vm.add_memory_slot(in_the_way)
        memory = GuestMemory(noted)
        with pytest.raises(FileExistsError, match=f"VM: slot 1 for .{RAM:#x}, .* with guest_memfd"):
            memory.map(block, RAM)
        assert noted.take_calls() == [
            ("private", RAM, SIZE),
            ("add", RAM, SIZE),
            ("shared", RAM, SIZE),
        ]
        assert memory.sections == ()
        vm.remove_memory_slot(in_the_way)
        memory.map(block, RAM)
        assert not memory.poisoned


def test_slot_can_be_added_again_after_its_removal(vm: KvmVm, block: RamBlock) -> None:
    memory = GuestMemory(vm)
    for _ in range(3):
        placed = memory.map(block, RAM)
        memory.unmap(placed)
    memory.map(block, 2 * RAM)


def test_many_sections_of_one_block(vm: KvmVm, block: RamBlock) -> None:
    memory = GuestMemory(vm)
    for page in range(PAGES):
        memory.map(block, RAM + 2 * page * PAGE, offset=page * PAGE, size=PAGE)
    memory.unmap(memory.sections[3])
    memory.map(block, RAM - PAGE, offset=3 * PAGE, size=PAGE)


def test_two_slots_cannot_have_one_part_of_a_guest_memfd(vm: KvmVm, block: RamBlock) -> None:
    vm.add_memory_slot(section(block, 0, 4, gpa=RAM))
    with pytest.raises(OSError, match="with guest_memfd") as caught:
        vm.add_memory_slot(section(block, 3, 4, gpa=2 * RAM))
    assert caught.value.errno in (errno.EEXIST, errno.EINVAL)
    vm.add_memory_slot(section(block, 4, 4, gpa=2 * RAM))


def test_read_only_section_with_guest_memfd_is_refused(vm: KvmVm, block: RamBlock) -> None:
    memory = GuestMemory(vm)
    with pytest.raises(UsageError, match="cannot be read-only"):
        memory.map(block, RAM, readonly=True)
    assert memory.sections == ()


def test_guest_memfd_of_another_vm_is_refused(kvm: Kvm, block: RamBlock) -> None:
    with kvm.create_vm() as other:
        memory = GuestMemory(other)
        with pytest.raises(UsageError, match="belongs to another VM"):
            memory.map(block, RAM)
        assert memory.sections == ()


def test_guest_memfd_that_can_be_mapped_is_no_private_side(vm: KvmVm) -> None:
    flags = GuestMemfdFlags.GUEST_MEMFD_FLAG_MMAP
    if not vm.guest_memfd_flags & flags:
        pytest.skip("the kernel cannot map a guest_memfd (Linux 6.18 can)")
    with (
        vm.create_guest_memfd(SIZE, flags) as private,
        RamBlock.create("ram", SIZE, private=private) as block,
        pytest.raises(UsageError, match="hides the block's own"),
    ):
        GuestMemory(vm).map(block, RAM)


def test_stand_in_serves_where_nothing_is_enforced(vm: KvmVm) -> None:
    with RamBlock.create("ram", SIZE, private="stand-in") as block:
        memory = GuestMemory(vm)
        memory.map(block, RAM)
        memory.convert(RAM, SIZE, SHARED)


# -- exits -----------------------------------------------------------------------------------------


def test_exits_of_map_gpa_range_can_be_enabled(kvm: Kvm, vm: KvmVm) -> None:
    if kvm.exit_hypercall >> 12 & 1:
        vm.enable_map_gpa_range_exits()
        vm.enable_map_gpa_range_exits()
    else:
        with pytest.raises(OSError, match="KVM_CAP_EXIT_HYPERCALL"):
            vm.enable_map_gpa_range_exits()


def test_kernel_without_these_exits_is_an_error(vm: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "capability", lambda _: 0)
    with pytest.raises(OSError, match="no KVM_CAP_EXIT_HYPERCALL") as caught:
        vm.enable_map_gpa_range_exits()
    assert caught.value.errno == errno.EOPNOTSUPP


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(("vm", "vcpu", "block", "private"))))
def test_closing_in_any_order_is_safe(kvm: Kvm, order: tuple[str, ...]) -> None:
    vm = kvm.create_vm()
    private = vm.create_guest_memfd(SIZE)
    block = RamBlock.create("ram", SIZE, private=private)
    memory = GuestMemory(vm)
    memory.map(block, RAM)
    memory.convert(RAM, PAGE, SHARED)
    closings: dict[str, Callable[[], None]] = {
        "vm": vm.close,
        "vcpu": vm.create_vcpu().close,
        "block": block.close,
        "private": private.close,
    }
    for name in order:
        closings[name]()
    assert not memory.poisoned
    assert not block.guard.poisoned
    for name in reversed(order):
        closings[name]()


def test_guest_memory_outlives_its_vm(vm: KvmVm, block: RamBlock) -> None:
    memory = GuestMemory(vm)
    placed = memory.map(block, RAM)
    vm.close()
    memory.convert(RAM, PAGE, SHARED)
    memory.unmap(placed)
    with pytest.raises(UsageError, match="VM is closed"):
        memory.map(block, RAM)
    with pytest.raises(UsageError, match="VM is closed"):
        vm.create_vcpu()
    assert not memory.poisoned
