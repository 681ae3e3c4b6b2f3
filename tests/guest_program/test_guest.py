"""
The guest program on this machine's KVM, asking as this KVM lets it: by the doorbell, where nothing
else is sure to work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu
from ramblock.errors import GuestProgramError, UsageError
from ramblock.guest_program import (
    Command,
    ConversionCall,
    GuestProgram,
    IdleEvent,
    Operation,
    Result,
    Status,
    choose_call,
)
from ramblock.guest_program.mailbox import RING_COMMANDS
from ramblock.kvm import (
    GuestConversions,
    GuestMemfd,
    HypercallExit,
    HypercallResult,
    Kvm,
    MemoryFaultExit,
    VmType,
)
from ramblock.units import GIB, MIB, PAGE_SIZE
from require import require_kvm

pytestmark = require_kvm

# Above 4 GiB: no 32-bit guest could name it.
GPA = 5 * GIB
SIZE = 8 * MIB
PRIVATE, SHARED = 1 << 4, 0

_KEEP_SIZE = 1  # include/uapi/linux/falloc.h
_libc = ctypes.CDLL(None)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Stack:
    """A VM with one block that has a guest_memfd, a device behind it, and the program."""

    def __init__(self, resources: ExitStack) -> None:
        kvm = resources.enter_context(Kvm())
        self.enforced = VmType.SW_PROTECTED in kvm.vm_types
        self.vm = resources.enter_context(
            kvm.create_vm(VmType.SW_PROTECTED if self.enforced else VmType.DEFAULT)
        )
        self.memory = GuestMemory(self.vm)
        self.private: GuestMemfd | None = None
        if kvm.has_guest_memfd:
            self.private = resources.enter_context(self.vm.create_guest_memfd(SIZE))
        self.block = resources.enter_context(
            RamBlock.create("ram", SIZE, private=self.private or "stand-in")
        )
        self.memory.map(self.block, GPA)
        self.iommu = SoftIommu()
        self.memory.attach(self.iommu)
        self.conversions = GuestConversions(self.memory)
        self.cpuid = kvm.supported_cpuid()
        self.call = choose_call(kvm)
        self.program = resources.enter_context(
            GuestProgram(self.vm, self.cpuid, base=GPA + SIZE, reach=[(GPA, SIZE)], call=self.call)
        )

    def guest(self, *commands: Command) -> list[Result]:
        """Let the guest do commands, and answer what it asks for."""
        for command in commands:
            self.program.put(command)
        while not isinstance(event := self.program.run(), IdleEvent):
            if isinstance(event, HypercallExit):
                self.program.answer(self.conversions.answer(event))
            else:
                assert isinstance(event, MemoryFaultExit)
                self.conversions.memory_fault(event)
        return self.program.results()

    def convert(self, gpa: int, pages: int, attributes: int) -> int:
        """Let the guest ask; return what it was told."""
        (result,) = self.guest(Command(Operation.CONVERT, gpa, pages, attributes))
        assert result.status == Status.DONE
        return result.found


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with ExitStack() as resources:
        yield Stack(resources)


def fill(gpa: int, size: int, value: int) -> Command:
    return Command(Operation.FILL, gpa, size, value, PAGE_SIZE, 3)


def check(gpa: int, size: int, value: int) -> Command:
    return Command(Operation.CHECK, gpa, size, value, PAGE_SIZE, 3)


def test_a_page_is_shared_touched_and_made_private_again(stack: Stack) -> None:
    gpa, size = GPA + 3 * PAGE_SIZE, 70 * PAGE_SIZE
    before = stack.block.allocated_bytes()
    assert before is not None
    assert stack.convert(gpa, 70, SHARED) == HypercallResult.DONE
    results = stack.guest(fill(gpa, size, 100), check(gpa, size, 100))
    assert [result.status for result in results] == [Status.DONE] * 2
    # The host sees it, the device sees it, and the memory is really there.
    offset = 3 * PAGE_SIZE + 69 * PAGE_SIZE
    assert stack.block.read(offset, 8) == (100 + 69 * 3).to_bytes(8, "little")
    assert stack.iommu.read(GPA + offset, 8) == (100 + 69 * 3).to_bytes(8, "little")
    assert stack.block.allocated_bytes() == before + size
    # A device's write is what the guest reads.
    stack.iommu.write(gpa, (7).to_bytes(8, "little"))
    (result,) = stack.guest(check(gpa, 8, 7))
    assert result.status == Status.DONE
    # Private again: unmapped, and really freed.
    assert stack.convert(gpa, 70, PRIVATE) == HypercallResult.DONE
    assert stack.iommu.mappings() == []
    assert stack.block.allocated_bytes() == before
    assert stack.block.read(offset, 8) == bytes(8)


def test_private_memory_is_really_freed(stack: Stack) -> None:
    if stack.private is None or stack.private.allocated_bytes() is None:
        pytest.skip("this kernel does not tell how much of a guest_memfd is in use (cachestat(2))")
    size = 16 * PAGE_SIZE
    if stack.enforced:
        stack.guest(fill(GPA, size, 1))
    else:  # the guest does not reach it: somebody else has to use it
        assert _libc.fallocate(stack.private.fd, _KEEP_SIZE, 0, size) == 0
    assert stack.private.allocated_bytes() == size
    assert stack.convert(GPA, 16, SHARED) == HypercallResult.DONE
    assert stack.private.allocated_bytes() == 0
    assert stack.convert(GPA, 16, PRIVATE) == HypercallResult.DONE


def test_thousands_of_conversions_in_batches(stack: Stack) -> None:
    done = 0
    for attributes in (SHARED, PRIVATE) * 2:
        commands = [
            Command(Operation.CONVERT, GPA + number * PAGE_SIZE, 1, attributes)
            for number in range(1024)
        ]
        results = stack.guest(*commands)
        assert {result.found for result in results} == {HypercallResult.DONE}
        done += len(results)
    assert done == 4096
    assert list(stack.memory.ranges(PageState.SHARED)) == []


@pytest.mark.parametrize(
    ("gpa", "pages", "attributes"),
    [
        (GPA + 5, 1, SHARED),
        (GPA, 0, SHARED),
        (GPA - PAGE_SIZE, 2, SHARED),
        (GPA + SIZE - PAGE_SIZE, 2, PRIVATE),
        ((1 << 64) - PAGE_SIZE, 2, SHARED),
        (GPA, (1 << 64) - 1, SHARED),
        (GPA, 1, 1 << 63),
    ],
)
def test_a_request_that_cannot_be_is_answered(
    stack: Stack, gpa: int, pages: int, attributes: int
) -> None:
    # The number is negative where KVM refuses before anybody is asked.
    assert abs(stack.convert(gpa, pages, attributes)) == HypercallResult.EINVAL
    assert list(stack.memory.ranges(PageState.SHARED)) == []


def test_an_unanswered_request_is_refused(stack: Stack) -> None:
    stack.program.put(Command(Operation.CONVERT, GPA, 1, SHARED))
    assert isinstance(stack.program.run(), HypercallExit)
    assert isinstance(stack.program.run(), IdleEvent)
    (result,) = stack.program.results()
    assert result.found in (HypercallResult.EINVAL, (1 << 32) - 1)
    with pytest.raises(UsageError, match="asked for nothing"):
        stack.program.answer(HypercallResult.DONE)


def test_a_mismatch_names_the_first_bad_word(stack: Stack) -> None:
    stack.convert(GPA, 4, SHARED)
    bad = GPA + 2 * PAGE_SIZE
    *_, result = stack.guest(
        fill(GPA, 4 * PAGE_SIZE, 50), fill(bad, 8, 1), check(GPA, 4 * PAGE_SIZE, 50)
    )
    assert (result.status, result.found, result.address) == (Status.MISMATCH, 1, bad)
    stack.convert(GPA, 4, PRIVATE)


# -- bad contents of the mailbox -------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        Command(0, GPA, 8, 0, 8),
        Command(99, GPA, 8, 0, 8),
        Command((1 << 64) - 1, GPA, 8, 0, 8),
        Command(Operation.FILL, GPA, 8, 0, 0),
        Command(Operation.CHECK, GPA, 8, 0, 7),
        Command(Operation.FILL, GPA, 0, 0, 8),
        Command(Operation.CHECK, GPA, 1 << 63, 0, 8, 0)._replace(gpa=1 << 63),
    ],
)
def test_nonsense_is_refused_and_the_guest_goes_on(stack: Stack, command: Command) -> None:
    first, second = stack.guest(command, Command(Operation.CONVERT, GPA, 1, PRIVATE))
    assert first.status == Status.REFUSED
    assert (second.status, second.found) == (Status.DONE, HypercallResult.DONE)


# Not where the program itself is: it would do what it is told there, too.
anything = st.one_of(
    st.integers(0, GPA + SIZE - 2 * MIB),
    st.integers(GPA + GIB, (1 << 64) - 1),
    st.sampled_from([0, 1, 8, PAGE_SIZE, GPA, 1 << 47]),
)


@settings(max_examples=40)
@given(
    batch=st.lists(
        st.tuples(st.sampled_from([*Operation, 0, 77]), anything, st.integers(0, MIB), anything),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_is_in_the_mailbox_the_run_comes_back(
    batch: list[tuple[int, int, int, int]],
) -> None:
    """Each command is done, refused, or ends the program with an error that says why."""
    commands = [Command(op, gpa, size, value, 64 * PAGE_SIZE) for op, gpa, size, value in batch]
    with ExitStack() as resources:
        stack = Stack(resources)
        results, error = [], None
        try:
            results = stack.guest(*commands)
        except GuestProgramError as caught:
            error = caught
    if error is not None:
        assert error.rip is not None
        assert error.address is not None or error.vector is not None
    else:
        assert [result.command for result in results] == commands
        assert {result.status for result in results} <= set(Status)


# -- a guest that cannot go on ---------------------------------------------------------------------


@pytest.fixture
def doomed() -> Iterator[Stack]:
    with ExitStack() as resources:
        yield Stack(resources)


def test_a_page_fault_names_rip_and_address(doomed: Stack) -> None:
    with pytest.raises(
        GuestProgramError, match=r"exception 14 at 0x4000000000, .* RIP 0x"
    ) as caught:
        doomed.guest(fill(1 << 38, 8, 0))
    assert (caught.value.vector, caught.value.address) == (14, 1 << 38)
    assert caught.value.rip is not None
    assert GPA + SIZE <= caught.value.rip < GPA + SIZE + MIB


def test_a_general_protection_fault_has_no_address(doomed: Stack) -> None:
    with pytest.raises(GuestProgramError, match="exception 13, error code 0x0") as caught:
        doomed.guest(check(1 << 62, 8, 0))
    assert (caught.value.vector, caught.value.address) == (13, None)


def test_a_hole_that_the_tables_reach_is_named(doomed: Stack) -> None:
    # In the same GiB as the block, where no memory is.
    with pytest.raises(GuestProgramError, match="where no memory is, RIP 0x") as caught:
        doomed.guest(check(GPA + 512 * MIB, 8, 0))
    assert caught.value.address == GPA + 512 * MIB


def test_a_triple_fault_is_told(doomed: Stack) -> None:
    # Without handlers: the limit of the IDT is its first word in the descriptor table register.
    special = doomed.program._vcpu.special_registers
    special.idt.limit = 0
    doomed.program._vcpu.special_registers = special
    with pytest.raises(GuestProgramError, match="triple fault") as caught:
        doomed.guest(fill(1 << 38, 8, 0))
    assert "RIP" in str(caught.value)


# -- life ------------------------------------------------------------------------------------------


def test_a_closed_program_is_refused_and_its_slot_is_free_again(doomed: Stack) -> None:
    doomed.program.close()
    doomed.program.close()
    for use in (doomed.program.results, lambda: doomed.program.room, doomed.program.run):
        with pytest.raises(UsageError, match="closed"):
            use()
    # Another one can have its place.
    with GuestProgram(
        doomed.vm, doomed.cpuid, base=GPA + SIZE, reach=[(GPA, SIZE)], call=doomed.call
    ) as program:
        program.put(fill(GPA, 8, 7))
        assert isinstance(program.run(), IdleEvent)


def test_a_full_ring_is_refused(doomed: Stack) -> None:
    for _ in range(RING_COMMANDS):
        doomed.program.put(Command(Operation.CONVERT, GPA, 1, PRIVATE))
    assert doomed.program.room == 0
    with pytest.raises(UsageError, match="are waiting"):
        doomed.program.put(Command(Operation.CONVERT, GPA, 1, PRIVATE))
    assert len(doomed.guest()) == RING_COMMANDS


def test_out_of_reach_holds_nothing(doomed: Stack) -> None:
    with pytest.raises(UsageError, match="reach"):
        GuestProgram(doomed.vm, doomed.cpuid, base=0, reach=[(1 << 47, 1)], call=doomed.call)
    with pytest.raises(OSError, match="slot"):  # overlaps the block
        GuestProgram(doomed.vm, doomed.cpuid, base=GPA, reach=[], call=doomed.call)
    assert doomed.guest(Command(Operation.CONVERT, GPA, 1, PRIVATE))[0].status == Status.DONE


def test_the_doorbell_works_wherever_kvm_does() -> None:
    with ExitStack() as resources:
        stack = Stack(resources)
        stack.program.close()
        kvm = resources.enter_context(Kvm())
        vm = resources.enter_context(kvm.create_vm())
        block = resources.enter_context(RamBlock.create("other", MIB, private="stand-in"))
        if vm.enforces_attributes:
            pytest.skip("a stand-in cannot serve this VM")
        memory = GuestMemory(vm)
        memory.map(block, 0)
        program = resources.enter_context(
            GuestProgram(
                vm,
                kvm.supported_cpuid(),
                base=MIB,
                reach=[(0, MIB)],
                call=ConversionCall.DOORBELL,
            )
        )
        program.put(Command(Operation.CONVERT, 0, 256, SHARED))
        event = program.run()
        assert isinstance(event, HypercallExit)
        assert (event.nr, event.args[:3], event.long_mode) == (12, (0, 256, 0), True)
        program.answer(GuestConversions(memory).answer(event))
        assert isinstance(program.run(), IdleEvent)
        assert memory.state(0) is PageState.SHARED
        assert repr(program) == "<GuestProgram that asks by doorbell>"
