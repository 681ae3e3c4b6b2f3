"""
KVM with attributes that the kernel enforces: a software-protected VM (CONFIG_KVM_SW_PROTECTED_VM)
in the lab.

What ``tests/kvm`` shows of the kernel holds here too; this file has what needs private pages.
"""

import ctypes
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from doubles import PAGE
from kvm_guests import (
    HALT,
    VMMCALL,
    enter_flat_32bit,
    jump_back,
    load,
    move,
    run_through,
    store,
    write_code,
    write_port,
    written,
)
from kvm_vms import SlotFirstVm
from ramblock import GuestMemory, PageState, RamBlock, RamSection
from ramblock.errors import UsageError
from ramblock.kvm import (
    Exit,
    GuestConversions,
    GuestMemfd,
    GuestMemfdFlags,
    HaltExit,
    HypercallExit,
    HypercallResult,
    InterruptedExit,
    IoExit,
    Kvm,
    KvmVm,
    MemoryAttributes,
    MemoryFaultExit,
    StuckGuestError,
    StuckReason,
    Vcpu,
    VmType,
)
from ramblock.units import MIB

PAGES = 1024
SIZE = PAGES * PAGE
RAM = 0x40_0000
CODE, CODE_SIZE = 0x1000, 4 * PAGE
PORT = 0x10
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
TO_SHARED, TO_PRIVATE = 0x00, 0x10
HOST = int.from_bytes(b"HOST", "little")

_FALLOC_FL_KEEP_SIZE = 0x01
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Guest:
    """
    A software-protected VM with a vCPU, ordinary RAM for its code, and a confidential block at RAM.
    """

    vm: KvmVm
    vcpu: Vcpu
    code: RamBlock
    block: RamBlock
    private: GuestMemfd
    memory: GuestMemory
    conversions: GuestConversions

    def begin(self, *instructions: bytes) -> None:
        write_code(self.code, CODE, *instructions)
        enter_flat_32bit(self.vcpu, CODE)

    def execute(self, *instructions: bytes) -> Exit:
        self.begin(*instructions)
        return run_through(self.vcpu)

    def read(self, gpa: int) -> int:
        """Let the guest read a word."""
        return written(self.execute(load(gpa), write_port(PORT)))

    def write(self, gpa: int, value: int) -> None:
        """Let the guest write a word."""
        assert self.execute(move("eax", value), store(gpa), HALT) == HaltExit()

    def ask(self, gpa: int, pages: int, word: int) -> HypercallExit:
        """Let the guest ask for a conversion; it then shows the answer."""
        exit = self.execute(
            *(move("eax", 12), move("ebx", gpa), move("ecx", pages), move("edx", word)),
            *(VMMCALL, write_port(PORT)),
        )
        assert isinstance(exit, HypercallExit), exit
        return exit

    def convert(self, gpa: int, pages: int, word: int) -> int:
        """Let the guest ask, answer it, and tell what it was told."""
        self.vcpu.set_hypercall_result(self.conversions.answer(self.ask(gpa, pages, word)))
        return written(run_through(self.vcpu))


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[KvmVm]:
    with kvm.create_vm(VmType.SW_PROTECTED) as vm:
        yield vm


@pytest.fixture
def private(vm: KvmVm) -> Iterator[GuestMemfd]:
    with vm.create_guest_memfd(SIZE) as private:
        yield private


@pytest.fixture
def guest(kvm: Kvm, vm: KvmVm, private: GuestMemfd) -> Iterator[Guest]:
    memory = GuestMemory(vm)
    with (
        RamBlock.create("code", CODE_SIZE) as code,
        RamBlock.create("ram", SIZE, private=private) as block,
    ):
        memory.map(code, 0)
        memory.map(block, RAM)
        vm.enable_map_gpa_range_exits()
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        yield Guest(vm, vcpu, code, block, private, memory, GuestConversions(memory))


# -- what the kernel has ---------------------------------------------------------------------------


def test_kernel_enforces_attributes(kvm: Kvm, vm: KvmVm) -> None:
    assert kvm.vm_types == set(VmType)
    assert kvm.memory_attributes == MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert kvm.exit_hypercall == 1 << 12
    assert vm.enforces_attributes
    with kvm.create_vm() as ordinary:
        assert not ordinary.enforces_attributes


def test_guest_memfd_of_a_protected_vm_starts_private(kvm: Kvm, vm: KvmVm) -> None:
    # kvm_arch_supports_gmem_init_shared(), arch/x86/kvm/x86.c
    assert GuestMemfdFlags.GUEST_MEMFD_FLAG_INIT_SHARED in kvm.guest_memfd_flags
    assert vm.guest_memfd_flags == GuestMemfdFlags.GUEST_MEMFD_FLAG_MMAP
    with pytest.raises(OSError, match="guest_memfd") as caught:
        vm.create_guest_memfd(PAGE, GuestMemfdFlags.GUEST_MEMFD_FLAG_INIT_SHARED)
    assert caught.value.errno == errno.EINVAL


def test_attributes_may_span_slots_and_holes(guest: Guest) -> None:
    guest.vm.set_memory_attributes(0x1000_0000, 64 * MIB, private=True)
    guest.vm.set_memory_attributes(RAM - PAGE, SIZE + 2 * PAGE, private=False)
    guest.block.write(0, b"HOST")
    assert guest.read(RAM) == HOST


# -- private and shared ----------------------------------------------------------------------------


def test_private_page_is_not_the_hosts(guest: Guest) -> None:
    guest.block.write(0, b"HOST")
    assert guest.read(RAM) == 0
    guest.write(RAM, 0x5EC2E7)
    assert guest.read(RAM) == 0x5EC2E7
    assert guest.block.read(0, 4) == b"HOST"


def test_conversion_changes_what_the_guest_sees(guest: Guest) -> None:
    guest.write(RAM, 0x5EC2E7)
    assert guest.convert(RAM, 1, TO_SHARED) == 0
    assert guest.read(RAM) == 0
    guest.block.write(0, b"HOST")
    assert guest.read(RAM) == HOST
    guest.write(RAM + 4, int.from_bytes(b"BACK", "little"))
    assert guest.block.read(0, 8) == b"HOSTBACK"
    assert guest.convert(RAM, 1, TO_PRIVATE) == 0
    assert guest.read(RAM) == 0  # the private page was freed, and is a new one
    assert guest.block.read(0, 4) == bytes(4)  # so was the shared one


@pytest.mark.parametrize(
    ("first", "count", "word"),
    [
        pytest.param(5, 1, TO_SHARED, id="one page"),
        pytest.param(0, 512, TO_SHARED | 1, id="2 MiB, and a hint"),
        pytest.param(3, 700, TO_SHARED, id="from inside one huge page into the next"),
        pytest.param(511, 2, TO_SHARED, id="around the border of two"),
    ],
)
def test_conversion_is_exact(guest: Guest, first: int, count: int, word: int) -> None:
    guest.block.write(0, b"HOST" * (SIZE // 4))
    assert guest.convert(RAM + first * PAGE, count, word) == 0
    edges = {first, first + count - 1, max(first - 1, 0), min(first + count, PAGES - 1)}
    for page in sorted(edges):
        shared = first <= page < first + count
        assert guest.read(RAM + page * PAGE) == (HOST if shared else 0), page
    assert guest.convert(RAM + first * PAGE, count, TO_PRIVATE) == 0
    for page in sorted(edges):
        assert guest.read(RAM + page * PAGE) == 0, page
    assert list(guest.memory.ranges(SHARED)) == [(0, CODE_SIZE)]


def test_pages_are_freed(guest: Guest) -> None:
    for page in range(4):
        guest.write(RAM + page * PAGE, page + 1)
    assert guest.private.allocated_bytes() == 4 * PAGE
    guest.convert(RAM + PAGE, 2, TO_SHARED)
    assert guest.private.allocated_bytes() == 2 * PAGE
    assert [guest.read(RAM + page * PAGE) for page in range(4)] == [1, 0, 0, 4]
    assert guest.block.allocated_bytes() == 2 * PAGE
    guest.convert(RAM, 4, TO_PRIVATE)
    assert guest.block.allocated_bytes() == 0


def unevictable() -> int:
    """
    What the machine counts as pages that cannot be swapped, in bytes: all of guest_memfd, and
    hardly anything else here.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Unevictable"].split()[0]) * 1024


def test_machine_gets_its_memory_back(vm: KvmVm) -> None:
    size = 128 * MIB
    with vm.create_guest_memfd(size) as memory:
        before = unevictable()
        arguments = ctypes.c_int64(0), ctypes.c_int64(size)
        assert _libc.fallocate(memory.fd, _FALLOC_FL_KEEP_SIZE, *arguments) == 0
        # Each processor keeps a few pages on an account of its own for a while (vm_stat,
        # mm/vmstat.c).
        assert abs(unevictable() - before - size) < 4 * MIB
        memory.discard(0, size)
        assert abs(unevictable() - before) < 4 * MIB


# -- hypercalls ------------------------------------------------------------------------------------


def test_hypercall_comes_out_with_its_arguments(guest: Guest) -> None:
    exit = guest.ask(RAM, 3, TO_PRIVATE | 1)
    assert (exit.nr, exit.args[:3], exit.long_mode) == (12, (RAM, 3, 0x11), False)


@pytest.mark.parametrize("result", list(HypercallResult))
def test_guest_is_told_the_result(guest: Guest, result: HypercallResult) -> None:
    guest.ask(RAM, 1, TO_SHARED)
    guest.vcpu.set_hypercall_result(result)
    assert written(run_through(guest.vcpu)) == result


def test_hypercall_that_nobody_answers_is_refused(guest: Guest) -> None:
    guest.ask(RAM, 1, TO_SHARED)
    assert written(run_through(guest.vcpu)) == errno.EINVAL


def test_hypercall_of_another_kind_does_not_come_out(guest: Guest) -> None:
    exit = guest.execute(move("eax", 11), VMMCALL, write_port(PORT))
    assert isinstance(exit, IoExit)


@pytest.mark.parametrize(
    ("gpa", "pages", "word", "answer"),
    [
        pytest.param(RAM, 1, TO_SHARED, 0, id="to shared"),
        pytest.param(0x8000_0000, 16, TO_SHARED, 0, id="a hole to shared"),
        pytest.param(0x8000_0000, 16, TO_PRIVATE, errno.EINVAL, id="a hole to private"),
        pytest.param(0, 1, TO_SHARED, errno.EINVAL, id="ordinary RAM"),
        pytest.param(RAM, PAGES + 1, TO_SHARED, errno.EINVAL, id="RAM, then a hole"),
        pytest.param(RAM, 0xFFFF_FFFF, TO_PRIVATE, errno.EINVAL, id="far too much"),
        pytest.param(RAM, 1, 0x20, errno.EINVAL, id="reserved bit"),
    ],
)
def test_answers(guest: Guest, gpa: int, pages: int, word: int, answer: int) -> None:
    assert guest.convert(gpa, pages, word) == answer
    shared = [(0, CODE_SIZE), (RAM, PAGE)] if gpa == RAM and not answer else [(0, CODE_SIZE)]
    assert list(guest.memory.ranges(SHARED)) == shared


# -- memory faults ---------------------------------------------------------------------------------


def test_private_page_without_a_private_side_faults(guest: Guest) -> None:
    guest.vm.set_memory_attributes(2 * PAGE, PAGE, private=True)  # ordinary RAM, behind our back
    fault = guest.execute(load(2 * PAGE), HALT)
    assert fault == MemoryFaultExit(
        gpa=2 * PAGE,
        size=PAGE,
        flags=MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE,
        errno=errno.EFAULT,
    )
    guest.vm.set_memory_attributes(2 * PAGE, PAGE, private=False)
    assert run_through(guest.vcpu) == HaltExit()


def test_same_fault_again_stops_the_guest(guest: Guest) -> None:
    guest.vm.set_memory_attributes(2 * PAGE, PAGE, private=True)
    fault = guest.execute(load(2 * PAGE), HALT)
    assert isinstance(fault, MemoryFaultExit)
    guest.conversions.memory_fault(fault)
    again = run_through(guest.vcpu)
    assert isinstance(again, MemoryFaultExit)
    with pytest.raises(StuckGuestError) as caught:
        guest.conversions.memory_fault(again)
    assert caught.value.reason is StuckReason.NO_PROGRESS
    assert isinstance(caught.value.__cause__, UsageError)


def test_guest_memfd_that_is_gone_faults(guest: Guest) -> None:
    guest.private.close()
    fault = guest.execute(load(RAM), HALT)
    assert isinstance(fault, MemoryFaultExit)
    assert (fault.gpa, fault.errno) == (RAM, errno.EFAULT)


def test_stand_in_cannot_serve_private_pages(vm: KvmVm) -> None:
    with RamBlock.create("ram", SIZE, private="stand-in") as block:
        memory = GuestMemory(vm)
        with pytest.raises(UsageError, match="could not touch its private pages"):
            memory.map(block, RAM)
        assert memory.sections == ()


# -- from the first moment -------------------------------------------------------------------------


class Looker:
    """
    A vCPU on a thread of its own that waits for an address in its memory, without leaving the
    guest, and then reads there.

    It must not touch the place before: an access to a hole leaves an MMIO entry in KVM's page
    tables, which neither a slot nor an attribute removes, and a software-protected VM takes an
    access through it for a shared one (kvm_mmu_page_fault(), arch/x86/kvm/mmu/mmu.c). So the first
    look at a page that was a hole, and is private now, would fault for ever.
    """

    WHERE, IDLE = CODE + PAGE, CODE + PAGE + 4

    def __init__(self, guest: Guest) -> None:
        self.seen: set[int] = set()
        self.looks = 0
        self._vcpu = guest.vcpu
        self._code = guest.code
        self._stop = False
        look = b"\x8b\x00" + write_port(PORT)  # mov eax, [eax]
        again = len(b"".join((wait := load(self.WHERE) + b"\x85\xc0\x74", b"?", look)))
        idle = b"\xff\x05" + self.IDLE.to_bytes(4, "little")  # inc dword [IDLE]
        skip = bytes((len(look) + len(jump_back(0)),))
        guest.begin(
            *(wait, skip, look, jump_back(again)),
            *(idle, jump_back(again + len(jump_back(0)) + len(idle))),
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            # A memory fault is a look that was too early: the attribute is there, and the slot is
            # not yet.
            exit = self._vcpu.run()
            if isinstance(exit, IoExit):
                self.seen.add(written(exit))
                self.looks += 1
            else:
                assert isinstance(exit, MemoryFaultExit | InterruptedExit), exit

    def look_at(self, gpa: int) -> None:
        # One store: pwrite(2) copies byte by byte, and the guest would look at an address that is
        # new in part.
        ctypes.c_uint32.from_address(self._code.address + self.WHERE).value = gpa

    def wait_for_looks(self, count: int) -> None:
        end = self.looks + count
        wait_until(lambda: self.looks >= end)

    def look_away(self) -> None:
        """Return when it does not look any more."""
        self.look_at(0)
        before = self._code.read(self.IDLE, 4)
        wait_until(lambda: self._code.read(self.IDLE, 4) != before)

    def stop(self) -> None:
        self._stop = True
        self._vcpu.kick()
        self._thread.join(60)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


class SlotLookedAt:
    """Lets somebody look at a slot just before it is there."""

    def __init__(self, vm: KvmVm, looker: Looker) -> None:
        self._vm = vm
        self._looker = looker

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        self._vm.set_memory_attributes(gpa, size, private)

    def add_memory_slot(self, section: RamSection) -> None:
        self._looker.look_at(section.gpa)
        self._vm.add_memory_slot(section)

    def remove_memory_slot(self, section: RamSection) -> None:
        self._looker.look_away()
        self._vm.remove_memory_slot(section)


def place_and_look(guest: Guest, memory: GuestMemory, looker: Looker, rounds: int) -> None:
    """
    Place a block with something on its shared side, each time where nothing was before, and let the
    guest look.
    """
    for number in range(rounds):
        gpa = 2 * RAM + number * PAGE
        with (
            guest.vm.create_guest_memfd(PAGE) as private,
            RamBlock.create("late", PAGE, private=private) as late,
        ):
            late.write(0, b"HOST")
            placed = memory.map(late, gpa)
            looker.look_at(gpa)
            looker.wait_for_looks(2)
            looker.look_away()
            memory.unmap(placed)


def test_no_look_finds_the_shared_side_of_a_private_page(guest: Guest) -> None:
    looker = Looker(guest)
    try:
        memory = GuestMemory(SlotLookedAt(guest.vm, looker))
        place_and_look(guest, memory, looker, rounds=100)
    finally:
        looker.stop()
    assert looker.seen == {0}


def test_looks_would_find_it_if_the_slot_came_first(guest: Guest) -> None:
    looker = Looker(guest)
    try:
        memory = GuestMemory(SlotFirstVm(guest.vm, looker.look_at))
        place_and_look(guest, memory, looker, rounds=20)
    finally:
        looker.stop()
    assert HOST in looker.seen


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(("vm", "block", "private"))))
def test_closing_in_any_order_is_safe(kvm: Kvm, order: tuple[str, ...]) -> None:
    vm = kvm.create_vm(VmType.SW_PROTECTED)
    private = vm.create_guest_memfd(SIZE)
    block = RamBlock.create("ram", SIZE, private=private)
    memory = GuestMemory(vm)
    memory.map(block, RAM)
    memory.convert(RAM, PAGE, SHARED)
    closings = {"vm": vm.close, "block": block.close, "private": private.close}
    for name in order:
        closings[name]()
    assert not memory.poisoned
    assert not block.guard.poisoned
