"""
The whole stack on a real kernel: a guest asks by hypercall, KVM enforces, a device does DMA through
a real IOMMU.

After each conversion three views are compared: what the guest reads, what the host reads, and what
the device reaches.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab_devices import BOUNCE, Way, open_rig, wait_for_fault
from lab_faults import FaultLog
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import MappingPolicy
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
from ramblock.kvm import (
    GuestConversions,
    GuestMemfd,
    HypercallExit,
    HypercallResult,
    Kvm,
    MemoryFaultExit,
    VmType,
)
from ramblock.units import MIB, PAGE_SIZE
from ramblock.vfio import BouncePage

BLOCK = 8 * MIB
HUGE = 2 * MIB
# KVM_HC_MAP_GPA_RANGE's third argument: encrypted, and the hint at 2 MiB pages.
ENCRYPTED, HINT_2M = 1 << 4, 1 << 0


class Stack:
    """A software-protected VM of two blocks side by side, and edu behind one target."""

    def __init__(self, resources: ExitStack, way: Way) -> None:
        kvm = resources.enter_context(Kvm())
        call = choose_call(kvm)
        assert call is not ConversionCall.DOORBELL
        vm = resources.enter_context(kvm.create_vm(VmType.SW_PROTECTED))
        assert vm.enforces_attributes
        self.memory = GuestMemory(vm)
        self.blocks: list[RamBlock] = []
        self.private: list[GuestMemfd] = []
        for number in range(2):
            guest_memfd = resources.enter_context(vm.create_guest_memfd(BLOCK))
            block = resources.enter_context(
                RamBlock.create(f"ram{number}", BLOCK, private=guest_memfd)
            )
            self.memory.map(block, number * BLOCK)
            self.private.append(guest_memfd)
            self.blocks.append(block)
        reach = [(0, 2 * BLOCK)]
        self.program = resources.enter_context(
            GuestProgram(vm, kvm.supported_cpuid(), base=2 * BLOCK, reach=reach, call=call)
        )
        self.conversions = GuestConversions(self.memory)
        self.implicit: list[MemoryFaultExit] = []

        rig = resources.enter_context(open_rig(way))
        self.bounce = resources.enter_context(BouncePage(rig.target, BOUNCE))
        self.edu = rig.edu
        self.mapper = self.memory.attach(rig.target)
        resources.callback(self.memory.detach, self.mapper)
        self.faults = FaultLog()
        resources.callback(self.faults.close)

    # -- the guest ---------------------------------------------------------------------------------

    def guest(self, *commands: Command) -> list[Result]:
        """Let the guest do commands, and answer what it asks for."""
        for command in commands:
            self.program.put(command)
        while True:
            event = self.program.run()
            if isinstance(event, IdleEvent):
                break
            if isinstance(event, HypercallExit):
                self.program.answer(self.conversions.answer(event))
            else:
                self.implicit.append(event)
                self.conversions.memory_fault(event)
        results = self.program.results()
        assert [result.command for result in results] == list(commands)
        return results

    def convert(self, gpa: int, size: int, to: PageState) -> None:
        """Let the guest convert, and look at the answer and at the state."""
        word = (ENCRYPTED if to is PageState.PRIVATE else 0) | (HINT_2M if size >= HUGE else 0)
        (result,) = self.guest(Command(Operation.CONVERT, gpa, size // PAGE_SIZE, word))
        assert (result.status, result.found) == (Status.DONE, HypercallResult.DONE)
        assert all(self.memory.state(page) is to for page in range(gpa, gpa + size, PAGE_SIZE))

    def fill(self, gpa: int, size: int, value: int) -> None:
        """Let the guest write a word into each page: *value*, and one more for each page."""
        (result,) = self.guest(Command(Operation.FILL, gpa, size, value, PAGE_SIZE, 1))
        assert result.status == Status.DONE

    def check(self, gpa: int, size: int, value: int) -> None:
        """Let the guest read what :meth:`fill` wrote."""
        (result,) = self.guest(Command(Operation.CHECK, gpa, size, value, PAGE_SIZE, 1))
        assert result.status == Status.DONE, (hex(result.found), hex(result.address))

    # -- the host and the device -------------------------------------------------------------------

    def host_word(self, gpa: int) -> int:
        """Read a word of the shared side."""
        block = self.blocks[gpa // BLOCK]
        return int.from_bytes(block.read(gpa % BLOCK, 8), "little")

    def device_word(self, gpa: int) -> int:
        return int.from_bytes(self.edu.read_from_ram(gpa, 8, self.bounce), "little")

    def device_writes(self, gpa: int, word: int) -> None:
        self.edu.write_to_ram(gpa, word.to_bytes(8, "little"), self.bounce)


@pytest.fixture(params=Way, ids=lambda way: way.value)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with ExitStack() as resources:
        yield Stack(resources, request.param)


RANGES = {
    "one page": (5 * PAGE_SIZE, PAGE_SIZE),
    "2 MiB": (HUGE, HUGE),
    "starts inside a huge page": (HUGE + 7 * PAGE_SIZE, HUGE - 7 * PAGE_SIZE),
    "ends inside a huge page": (2 * HUGE, HUGE // 2 + PAGE_SIZE),
    "over two blocks": (BLOCK - 3 * PAGE_SIZE, 8 * PAGE_SIZE),
}
BEFORE, SHARED, DEVICE, AFTER = 0x1111_0000, 0x2222_0000, 0x3333_0000, 0x4444_0000


@pytest.mark.parametrize("where", RANGES)
def test_conversions_by_hypercall_in_all_three_views(stack: Stack, where: str) -> None:
    gpa, size = RANGES[where]
    last = gpa + size - PAGE_SIZE
    pages = size // PAGE_SIZE

    # Private: the guest has data that neither the host nor the device sees.
    stack.fill(gpa, size, BEFORE)
    assert {stack.host_word(gpa), stack.host_word(last)} == {0}
    assert sum(side.allocated_bytes() or 0 for side in stack.private) >= size
    assert not stack.implicit, "private pages were not private from the first moment"

    # Shared: all three see the same bytes, and the private pages are freed.
    stack.convert(gpa, size, PageState.SHARED)
    assert sum(side.allocated_bytes() or 0 for side in stack.private) == 0
    stack.check(gpa, 8, 0)
    stack.fill(gpa, size, SHARED)
    assert stack.host_word(gpa) == SHARED
    assert stack.device_word(last) == stack.host_word(last) == SHARED + pages - 1
    stack.device_writes(last, DEVICE)
    stack.check(last, 8, DEVICE)
    assert stack.mapper.mapped_bytes == size
    assert stack.faults.take() == []

    # One page private again: the guest alone reaches it, and the device its neighbours.
    middle = gpa + pages // 2 * PAGE_SIZE
    stack.convert(middle, PAGE_SIZE, PageState.PRIVATE)
    stack.fill(middle, 8, AFTER)
    assert stack.host_word(middle) == 0, "the shared page was not freed"
    wait_for_fault(stack.faults, lambda: stack.device_writes(middle, DEVICE))
    stack.check(middle, 8, AFTER)
    assert stack.host_word(middle) == 0
    for neighbour in (middle - PAGE_SIZE, middle + PAGE_SIZE):
        if gpa <= neighbour < gpa + size:
            stack.device_writes(neighbour, DEVICE + 1)
            stack.check(neighbour, 8, DEVICE + 1)
    assert stack.mapper.mapped_bytes == size - PAGE_SIZE
    assert stack.faults.take() == []

    # All private: nothing is mapped, and nothing of the shared side is left.
    stack.convert(gpa, size, PageState.PRIVATE)
    stack.check(middle, 8, AFTER)
    assert stack.mapper.mapped_bytes == stack.mapper.entries == 0
    assert [block.allocated_bytes() for block in stack.blocks] == [0, 0]
    wait_for_fault(stack.faults, lambda: stack.device_writes(gpa, DEVICE))
    assert not stack.memory.poisoned


# Guest address, pages, attribute word, and what the guest is told.
REQUESTS = [
    (1 << 40, 1, 0, HypercallResult.DONE),  # a hole, to shared: what firmware asks for MMIO
    (1 << 40, 1, ENCRYPTED, HypercallResult.EINVAL),
    ((1 << 64) - PAGE_SIZE, 2, 0, HypercallResult.EINVAL),
    (PAGE_SIZE + 1, 1, 0, HypercallResult.EINVAL),
    (0, 0, 0, HypercallResult.EINVAL),
    (0, 1, 1 << 63, HypercallResult.EINVAL),
    (2 * BLOCK - PAGE_SIZE, 2, ENCRYPTED, HypercallResult.EINVAL),
]


def test_requests_that_cannot_be_meant() -> None:
    with ExitStack() as resources:
        stack = Stack(resources, Way.CUTTING)
        for gpa, pages, word, answer in REQUESTS:
            (result,) = stack.guest(Command(Operation.CONVERT, gpa, pages, word))
            # What is misaligned or empty KVM refuses itself, with a negative number, before anybody
            # is asked.
            assert result.found in (answer, -answer), (hex(gpa), pages, hex(word))
            assert list(stack.memory.ranges(PageState.SHARED)) == []
            assert stack.mapper.entries == 0


def test_calls_for_one_mapping_per_page_and_per_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = {}
    for policy, way in ((MappingPolicy.PAGE, Way.NATIVE), (MappingPolicy.RUN, Way.CUTTING)):
        with ExitStack() as resources:
            stack = Stack(resources, way)
            assert stack.mapper.policy is policy
            results = [
                stack.memory.convert(gpa, size, to)
                for gpa, size in RANGES.values()
                for to in (PageState.SHARED, PageState.PRIVATE)
            ]
        calls[policy] = tuple(
            sum(getattr(result, name) for result in results)
            for name in ("map_calls", "unmap_calls")
        )
    pages = sum(size for _, size in RANGES.values()) // PAGE_SIZE
    with capsys.disabled():
        sys.stdout.write(f"\nmap and unmap calls for the same {pages} pages: {calls}\n")
    assert calls[MappingPolicy.PAGE] == (pages, pages)
    # One for each conversion, and one more for the range over two blocks.
    assert calls[MappingPolicy.RUN] == (len(RANGES) + 1,) * 2
