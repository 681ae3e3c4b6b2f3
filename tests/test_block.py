import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doubles import PAGE, RecordingListener, RecordingVm, attributes_of, discard, section
from ramblock import (
    BackendKind,
    GuestMemory,
    HostMemoryBackend,
    PageState,
    RamBlock,
    VirtioMem,
)
from ramblock.dma import SoftIommu
from ramblock.errors import DmaError, IommuFault, PoisonedError, UsageError
from ramblock.guest import block as module
from ramblock.hostmem import StandInPrivate
from ramblock.testing import FaultyTarget
from ramblock.units import MIB, TIB

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


def fd_of(block: RamBlock) -> int:
    assert block.fd is not None
    return block.fd


def allocated(block: RamBlock) -> int:
    return os.fstat(fd_of(block)).st_blocks * 512


def private_of(block: RamBlock) -> StandInPrivate:
    assert isinstance(block.private, StandInPrivate)
    return block.private


def is_mapped(name: str) -> bool:
    """Whether a memfd of that name is mapped into this process."""
    return f"/memfd:{name} " in Path("/proc/self/maps").read_text()


def from_backend(name: str, size: int, *, private: str | None = None) -> RamBlock:
    return RamBlock.from_backend(name, HostMemoryBackend(size=size), private=private)


Maker = Callable[..., RamBlock]
both_makers = pytest.mark.parametrize("make", [RamBlock.create, from_backend])


# -- making ----------------------------------------------------------------------------------------


@both_makers
def test_ordinary_ram(make: Maker) -> None:
    with make("ram", 4 * PAGE) as block:
        assert (block.name, block.size) == ("ram", 4 * PAGE)
        assert block.private is None
        assert block.attributes is None
        assert block.discard_manager.sources == ()
        assert block.discard_manager.is_populated(section(block))
        assert os.fstat(fd_of(block)).st_size == 4 * PAGE
        assert repr(block) == "<RamBlock 'ram': 16 KiB>"


@both_makers
def test_confidential_ram_starts_private(make: Maker) -> None:
    with make("ram", 4 * PAGE, private="stand-in") as block:
        attributes = attributes_of(block)
        assert attributes.shared_bytes == 0
        assert list(attributes.ranges(PRIVATE)) == [(0, 4 * PAGE)]
        assert block.discard_manager.sources == (attributes,)
        assert list(block.discard_manager.populated(section(block))) == []
        assert private_of(block).size == 4 * PAGE
        assert private_of(block).fd != block.fd


def test_anonymous_ram_has_no_descriptor() -> None:
    backend = HostMemoryBackend(size=4 * PAGE, kind=BackendKind.ANONYMOUS)
    with RamBlock.from_backend("ram", backend, private="stand-in") as block:
        assert block.fd is None
        assert block.allocated_bytes() is None
        block.write(PAGE, b"hello")
        assert block.read(PAGE, 5) == b"hello"


@both_makers
@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1, 1 << 63, 1 << 64, None, True, "4096"])
def test_bad_sizes(make: Maker, size: object) -> None:
    with pytest.raises(UsageError):
        make("ram", size)


@both_makers
@pytest.mark.parametrize("private", ["stand in", "", 3, object(), True, b"stand-in"])
def test_what_is_no_private_backing(make: Maker, private: object) -> None:
    with pytest.raises(UsageError, match="is not a private backing"):
        make("ram", PAGE, private=private)


@both_makers
def test_a_private_backing_that_is_too_small(make: Maker) -> None:
    small = StandInPrivate("small", PAGE)
    with pytest.raises(UsageError, match="0x2000 bytes, its private backing only 0x1000"):
        make("ram", 2 * PAGE, private=small)
    small.close()


@both_makers
def test_a_private_backing_of_somebody_else_stays_his_to_close(make: Maker) -> None:
    mine = StandInPrivate("mine", 4 * PAGE)
    with make("ram", 2 * PAGE, private=mine) as block:
        assert block.private is mine
    mine.write(0, b"still open")
    mine.close()


@both_makers
def test_a_private_backing_of_its_own_is_closed_with_the_block(make: Maker) -> None:
    block = make("ram", PAGE, private="stand-in")
    fd = private_of(block).fd
    block.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# -- reading and writing ---------------------------------------------------------------------------


@both_makers
@pytest.mark.parametrize("state", list(PageState))
def test_the_raw_shared_side_in_any_page_state(make: Maker, state: PageState) -> None:
    with make("ram", 4 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(0, 4 * PAGE, state)
        block.write(PAGE - 2, b"abcd")
        assert block.read(PAGE - 3, 6) == b"\0abcd\0"
        assert private_of(block).allocated_bytes() == 0


@both_makers
def test_reading_a_hole_allocates_nothing(make: Maker) -> None:
    with make("ram", MIB) as block:
        iommu = SoftIommu()
        memory = GuestMemory()
        memory.map(block, 0)
        memory.attach(iommu)
        assert block.read(0, MIB) == bytes(MIB)
        assert iommu.read(0, MIB) == bytes(MIB)
        assert allocated(block) == block.allocated_bytes() == 0
        # And the check can fail: a load through a mapping does allocate.
        assert iommu.read(5 * PAGE, 1) == b"\0"
        iommu.write(5 * PAGE, b"x")
        assert allocated(block) == PAGE


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 0),
        (0, -1),
        (-1, 1),
        (0, 4 * PAGE + 1),
        (4 * PAGE, 1),
        (1 << 64, 1),
        (0, 1 << 64),
        (None, 1),
        (0, None),
        (0, True),
        ("0", 1),
        (0.0, 1),
    ],
)
def test_reading_outside(offset: int, size: int) -> None:
    with RamBlock.create("ram", 4 * PAGE) as block, pytest.raises(UsageError):
        block.read(offset, size)


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, b""), (-1, b"x"), (4 * PAGE, b"x"), (4 * PAGE - 1, b"xx"), (None, b"x")],
)
def test_writing_outside_writes_nothing(offset: int, data: bytes) -> None:
    with RamBlock.create("ram", 4 * PAGE) as block:
        with pytest.raises(UsageError):
            block.write(offset, data)
        assert allocated(block) == 0


def test_a_block_costs_what_is_used_of_it() -> None:
    with RamBlock.create("ram", TIB, private="stand-in") as block:
        block.write(TIB - 1, b"x")
        assert allocated(block) == PAGE
        assert block.read(TIB // 2, 3) == b"\0\0\0"


# -- freeing, as a conversion does it --------------------------------------------------------------


@both_makers
def test_a_conversion_frees_the_side_that_is_no_longer_used(make: Maker) -> None:
    memory = GuestMemory(RecordingVm())
    with make("ram", 16 * PAGE, private="stand-in") as block:
        memory.map(block, 0)
        private_of(block).write(0, b"p" * (16 * PAGE))
        assert memory.convert(4 * PAGE, 8 * PAGE, SHARED).not_freed_bytes == 0
        assert private_of(block).allocated_bytes() == 8 * PAGE
        assert private_of(block).read(3 * PAGE, 1) == b"p"
        block.write(4 * PAGE, b"s" * (8 * PAGE))
        assert allocated(block) == 8 * PAGE
        assert memory.convert(4 * PAGE, 4 * PAGE, PRIVATE).not_freed_bytes == 0
        assert allocated(block) == 4 * PAGE
        assert block.read(4 * PAGE, 4 * PAGE) == bytes(4 * PAGE)
        assert block.read(8 * PAGE, 4 * PAGE) == b"s" * (4 * PAGE)
        assert block.not_freed_bytes == 0


def test_state_change_frees_nothing() -> None:
    with RamBlock.create("ram", 2 * PAGE, private="stand-in") as block:
        attributes_of(block).state_change(0, 2 * PAGE, SHARED)
        block.write(0, b"x" * (2 * PAGE))
        attributes_of(block).state_change(0, 2 * PAGE, PRIVATE)
        assert allocated(block) == 2 * PAGE


# -- closing ---------------------------------------------------------------------------------------


@both_makers
def test_a_closed_block_is_closed(make: Maker) -> None:
    block = make("closed-block", 2 * PAGE, private="stand-in")
    fd = fd_of(block)
    assert is_mapped("closed-block")
    assert not block.closed
    block.close()
    block.close()
    assert block.closed
    assert not is_mapped("closed-block")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(UsageError, match="block 'closed-block' is closed"):
        block.read(0, 1)
    with pytest.raises(UsageError, match="is closed"):
        block.write(0, b"x")
    with pytest.raises(UsageError, match="is closed"):
        attributes_of(block).state_change(0, PAGE, SHARED)
    with pytest.raises(UsageError, match="is closed"):
        VirtioMem(block, PAGE)
    with pytest.raises(UsageError, match="is closed"):
        block.discard_manager.register_listener(RecordingListener(), section(block))


def test_a_context_manager_closes_also_after_a_failure() -> None:
    with pytest.raises(KeyError), RamBlock.create("ram", PAGE) as block:
        raise KeyError
    assert block.closed


def test_listeners_hear_of_closing() -> None:
    block = RamBlock.create("ram", 4 * PAGE, private="stand-in")
    attributes_of(block).state_change(PAGE, 2 * PAGE, SHARED)
    listener = RecordingListener()
    block.discard_manager.register_listener(listener, section(block))
    listener.take_calls()
    block.close()
    assert listener.calls == [discard(1, 2)]
    assert listener.held == set()


def test_closing_a_placed_block_takes_it_out_of_the_guest() -> None:
    vm, iommu = RecordingVm(), SoftIommu()
    memory = GuestMemory(vm)
    mapper = memory.attach(iommu)
    with RamBlock.create("other", PAGE) as other:
        block = RamBlock.create("placed-block", 4 * PAGE, private="stand-in")
        memory.map(block, 0)
        memory.map(other, 8 * PAGE)
        memory.convert(0, 2 * PAGE, SHARED)
        vm.take_calls()
        block.close()
        assert [placed.block for placed in memory.sections] == [other]
        assert [(entry.iova, entry.size) for entry in iommu.mappings()] == [(8 * PAGE, PAGE)]
        assert (mapper.entries, mapper.mapped_bytes) == (1, PAGE)
        assert vm.take_calls() == [("remove", 0, 4), ("shared", 0, 4)]
        with pytest.raises(IommuFault):
            iommu.read(0, 1)
        with pytest.raises(UsageError, match="nothing is mapped"):
            memory.convert(0, PAGE, SHARED)
        assert not memory.poisoned
        assert not is_mapped("placed-block")
        # The guest goes on, and the addresses are free.
        with RamBlock.create("next", 4 * PAGE, private="stand-in") as following:
            memory.map(following, 0)
            assert memory.convert(0, PAGE, SHARED).map_calls == 1


@pytest.mark.parametrize("error", [OSError(5, "no"), DmaError("no")])
def test_closing_does_not_depend_on_the_vm(error: Exception) -> None:
    class Stubborn(RecordingVm):
        stubborn = False

        def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
            if self.stubborn:
                raise error
            super().set_memory_attributes(gpa, size, private)

    vm = Stubborn()
    memory = GuestMemory(vm)
    block = RamBlock.create("ram", PAGE, private="stand-in")
    memory.map(block, 0)
    vm.stubborn = True
    block.close()
    assert block.closed
    assert memory.sections == ()


def test_a_listener_that_cannot_let_go_does_not_stop_closing_and_poisons(
    forget_kept: None,
) -> None:
    block = RamBlock.create("ram", 2 * PAGE)
    listener, other = RecordingListener("stubborn"), RecordingListener("other")
    block.discard_manager.register_listener(listener, section(block))
    block.discard_manager.register_listener(other, section(block))
    listener.refuse_all("discard")
    block.close()
    assert block.closed
    assert block.guard.poisoned
    assert [doubt.target for doubt in block.guard.in_doubt()] == [listener]
    assert other.held == set()


class RaisesOnce:
    """
    For ``then`` of a stand-in: raises at the call with that number, though nobody pressed Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, _: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("number", range(1, 7))
def test_closing_does_not_refuse_whatever_a_vm_raises(number: int, forget_kept: None) -> None:
    vm, iommu = RecordingVm(), SoftIommu()
    memory = GuestMemory(vm)
    memory.attach(iommu)
    block = RamBlock.create("ram", 4 * PAGE, private="stand-in")
    memory.map(block, 0, size=2 * PAGE)
    memory.map(block, 8 * PAGE, offset=2 * PAGE)
    memory.convert(0, PAGE, SHARED)
    memory.convert(8 * PAGE, PAGE, SHARED)
    vm.then = RaisesOnce(number)
    block.close()
    assert block.closed
    assert (memory.sections, iommu.mappings(), list(vm.slots)) == ((), [], [])


def test_closing_does_not_refuse_whatever_a_listener_raises() -> None:
    block = RamBlock.create("ram", 2 * PAGE)
    first, second = RecordingListener("first"), RecordingListener("second")
    for listener in (first, second):
        block.discard_manager.register_listener(listener, section(block))
    second.then = RaisesOnce(1)
    block.close()
    assert block.closed
    assert (first.held, second.held) == (set(), set())


def test_closing_does_not_stop_at_a_listener_that_raises_each_time(forget_kept: None) -> None:
    block = RamBlock.create("ram", 2 * PAGE)
    first, second = RecordingListener("first"), RecordingListener("second")
    for listener in (first, second):
        block.discard_manager.register_listener(listener, section(block))

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    first.then = interrupt
    block.close()
    assert block.closed
    assert second.held == set()
    assert [doubt.target for doubt in block.guard.in_doubt()] == [first]


def test_a_vm_that_resets_no_attribute_does_no_harm_to_a_close() -> None:
    """Nothing is there any more that could be seen with the wrong one."""
    vm, iommu = RecordingVm(), SoftIommu()
    memory = GuestMemory(vm)
    memory.attach(iommu)
    block = RamBlock.create("not-kept", 2 * PAGE, private="stand-in")
    memory.map(block, 0)
    memory.convert(0, PAGE, SHARED)
    vm.refuse = lambda call: call[0] in {"private", "shared"}
    block.close()
    assert not memory.poisoned
    assert (memory.sections, iommu.mappings(), vm.slots) == ((), [], [])
    assert not is_mapped("not-kept")


def test_a_block_that_the_vm_does_not_let_go_of_keeps_its_pages(forget_kept: None) -> None:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    block = RamBlock.create("kept-by-the-vm", 2 * PAGE, private="stand-in")
    memory.map(block, 0)
    vm.refuse = lambda call: call[0] == "remove"
    block.close()
    assert block.closed
    assert [tuple(doubt) for doubt in memory.in_doubt()] == [(0, 2 * PAGE, vm)]
    assert is_mapped("kept-by-the-vm")


# -- what a poisoned block keeps -------------------------------------------------------------------


@pytest.fixture
def forget_kept() -> Iterator[None]:
    """Give back what only the end of the process gives back, so that tests do not pile it up."""
    yield
    while module._kept:
        module._kept.pop().close()


@pytest.fixture
def poisoned(
    caplog: pytest.LogCaptureFixture, forget_kept: None
) -> Iterator[tuple[GuestMemory, RamBlock, SoftIommu]]:
    """A guest whose target kept the second of two pages when both were made private."""
    caplog.set_level(logging.CRITICAL + 1)
    memory = GuestMemory()
    block = RamBlock.create("kept-block", 4 * PAGE, private="stand-in")
    iommu = SoftIommu()
    target = FaultyTarget(iommu)
    memory.map(block, 0)
    memory.attach(target)
    memory.convert(0, 2 * PAGE, SHARED)
    block.write(PAGE, b"reachable")
    target.short_unmap = range(1, 100)
    with pytest.raises(PoisonedError):
        memory.convert(0, 2 * PAGE, PRIVATE)
    yield memory, block, iommu
    block.close()


def test_a_poisoned_block_frees_nothing(
    poisoned: tuple[GuestMemory, RamBlock, SoftIommu],
) -> None:
    memory, block, iommu = poisoned
    assert allocated(block) == PAGE
    assert memory.state(PAGE) is SHARED
    assert iommu.read(PAGE, 9) == b"reachable"
    with pytest.raises(PoisonedError):
        block.free_pending()
    assert iommu.read(PAGE, 9) == b"reachable"


def test_a_closed_poisoned_block_keeps_its_pages_as_long_as_a_target_may_reach_them(
    poisoned: tuple[GuestMemory, RamBlock, SoftIommu],
) -> None:
    memory, block, iommu = poisoned
    fd, private_fd = fd_of(block), private_of(block).fd
    block.close()
    assert block.closed
    assert memory.sections == ()
    assert memory.poisoned
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(private_fd)  # no device ever reaches that side
    # Nobody holds the block, the memory or the wrapper around the IOMMU any more; the device is
    # still there.
    del memory, block, poisoned
    gc.collect()
    # It reaches this guest's page, and not somebody else's.
    assert iommu.read(PAGE, 9) == b"reachable"
    iommu.write(PAGE, b"x")
    assert os.fstat(fd).st_blocks * 512 == PAGE
    assert os.pread(fd, 9, PAGE) == b"xeachable"
    assert is_mapped("kept-block")


def test_a_poisoned_block_that_has_left_its_guest_keeps_its_pages_too(
    poisoned: tuple[GuestMemory, RamBlock, SoftIommu],
) -> None:
    memory, block, iommu = poisoned
    memory.unmap(memory.sections[0])
    assert block.placement is None
    assert block.guard.in_doubt() == memory.in_doubt() != []
    block.close()
    assert iommu.read(PAGE, 9) == b"reachable"


def test_a_block_that_is_closed_in_good_order_keeps_nothing() -> None:
    memory = GuestMemory()
    block = RamBlock.create("not-kept", 4 * PAGE, private="stand-in")
    memory.map(block, 0)
    memory.attach(SoftIommu())
    memory.convert(0, PAGE, SHARED)
    block.close()
    assert not is_mapped("not-kept")
    assert not module._kept
