"""
One memory for both states: the order, pins, what stops half-way, and that nothing is ever freed but
by unplugging.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doubles import PAGE, RecordingVm, attributes_of
from ramblock import (
    GuestMemory,
    HostMemoryBackend,
    MappingPolicy,
    PageState,
    RamBlock,
    VirtioMem,
)
from ramblock.dma import SoftIommu
from ramblock.errors import ConversionError, DmaError, PoisonedError, UsageError
from ramblock.guest import block as block_module
from ramblock.hostmem import InPlaceBacking
from ramblock.hostmem import backing as backing_module
from ramblock.hostmem.backing import punch_hole
from ramblock.hostmem.in_place import TRIES
from ramblock.testing import FaultyTarget, RecordingTarget, SimulatedInPlace, pages_of

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
COUNT = 8
BASE = 0x10_0000


def pages_in(ranges: Iterator[tuple[int, int]]) -> set[int]:
    return {page // PAGE for offset, size in ranges for page in range(offset, offset + size, PAGE)}


class Guest:
    """Eight pages in place at BASE, and one device, whose mappings pin."""

    def __init__(self) -> None:
        self.iommu = SoftIommu()
        self.target = FaultyTarget(self.iommu)
        self.recorder = RecordingTarget(self.target)
        self.vm = RecordingVm()
        self.memory = GuestMemory(self.vm)
        self.ram = SimulatedInPlace("ram", COUNT * PAGE, pinned_by=[self.iommu])
        self.block = RamBlock.create("ram", COUNT * PAGE, private=self.ram)
        self.section = self.memory.map(self.block, BASE)
        self.memory.attach(self.recorder)
        self.recorder.calls.clear()
        self.ram.calls.clear()
        self.vm.calls.clear()

    def convert(self, first: int, count: int, to: PageState) -> None:
        self.memory.convert(BASE + first * PAGE, count * PAGE, to)

    def private(self) -> set[int]:
        """Numbers of the pages that the memory calls private."""
        return pages_in(self.ram.private_ranges())

    def mapped(self) -> set[int]:
        return {(page - BASE) // PAGE for page in pages_of(self.iommu.mappings())}

    def picture(self) -> tuple[object, ...]:
        tracked = pages_in(attributes_of(self.block).ranges(SHARED))
        return self.private(), self.mapped(), tracked, self.ram.allocated_bytes()


@pytest.fixture
def guest(caplog: pytest.LogCaptureFixture) -> Iterator[Guest]:
    caplog.set_level(logging.CRITICAL + 1)
    made = Guest()
    yield made
    made.block.close()
    while block_module._kept:
        block_module._kept.pop().close()


# -- one memory ------------------------------------------------------------------------------------


def test_the_block_is_the_memory(guest: Guest) -> None:
    block, ram = guest.block, guest.ram
    backing: InPlaceBacking = ram
    assert {id(block.shared), id(block.private), id(block.in_place)} == {id(backing)}
    assert (block.fd, block.address, block.size) == (ram.fd, ram.address, ram.size)
    guest.convert(1, 2, SHARED)
    (mapping,) = guest.iommu.mappings()
    assert mapping.memory == (ram.fd, PAGE, ram.address + PAGE, 2 * PAGE)


def test_the_page_stays_where_it_is(guest: Guest) -> None:
    ram = guest.ram
    ram.write_as_guest(PAGE, b"guest")
    with pytest.raises(OSError, match="page 0x1000 is private") as caught:
        guest.block.read(PAGE, 5)
    assert caught.value.errno == errno.EFAULT
    guest.convert(0, 4, SHARED)
    assert guest.block.read(PAGE, 5) == guest.iommu.read(BASE + PAGE, 5) == b"guest"
    guest.iommu.write(BASE + PAGE, b"dev")
    guest.block.write(PAGE + 3, b"ic")
    guest.convert(1, 1, PRIVATE)
    assert ram.read_as_guest(PAGE, 5) == b"devic"
    with pytest.raises(OSError, match="page 0x1000 is private"):
        guest.block.write(PAGE - 1, b"xx")
    assert ram.allocated_bytes() == PAGE


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is freed of any memory, as (offset, size)."""
    holes: list[tuple[int, int]] = []

    def punch(fd: int, offset: int, size: int) -> None:
        holes.append((offset, size))
        punch_hole(fd, offset, size)

    monkeypatch.setattr(backing_module, "punch_hole", punch)
    return holes


def test_a_conversion_frees_nothing(guest: Guest, freed: list[tuple[int, int]]) -> None:
    guest.ram.write_as_guest(0, b"x" * guest.ram.size)
    for to in (SHARED, PRIVATE, SHARED):
        result = guest.memory.convert(BASE, COUNT * PAGE, to)
        assert (result.changed_bytes, result.not_freed_bytes) == (COUNT * PAGE, 0)
    assert guest.block.free_pending() == guest.block.not_freed_bytes == 0
    assert freed == []


def test_unplugging_frees_the_memory_once(guest: Guest, freed: list[tuple[int, int]]) -> None:
    device = VirtioMem(guest.block, PAGE)
    device.plug(0, COUNT * PAGE)
    guest.ram.write_as_guest(0, b"x" * guest.ram.size)
    guest.convert(0, 4, SHARED)
    freed.clear()
    device.unplug(2 * PAGE, 4 * PAGE)  # two shared pages and two private ones
    assert freed == [(2 * PAGE, 4 * PAGE)]
    assert guest.ram.allocated_bytes() == 4 * PAGE
    assert guest.mapped() == {0, 1}
    guest.convert(2, 4, SHARED)  # unplugged: converted, and neither mapped nor freed
    assert guest.mapped() == {0, 1}
    assert len(freed) == 1
    device.plug(2 * PAGE, 4 * PAGE)
    assert guest.mapped() == {0, 1, 2, 3, 4, 5}


def test_what_could_not_be_freed_when_unplugged_is_freed_later(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = VirtioMem(guest.block, PAGE)
    device.plug(0, COUNT * PAGE)
    guest.ram.write_as_guest(0, b"x" * guest.ram.size)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(backing_module, "punch_hole", refuse)
        device.unplug(0, 4 * PAGE)
        assert guest.block.not_freed_bytes == 4 * PAGE
        guest.convert(0, 4, SHARED)  # nobody's business: it is unplugged
        assert guest.block.not_freed_bytes == 4 * PAGE
        device.plug(0, PAGE)
        assert guest.block.not_freed_bytes == 3 * PAGE
    assert guest.block.free_pending() == 0
    assert guest.ram.allocated_bytes() == 5 * PAGE
    assert guest.block.read(0, 1) == b"x"


# -- the order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [PRIVATE, SHARED])
def test_to_private_unmap_comes_first_and_to_shared_map_comes_last(
    guest: Guest, to: PageState
) -> None:
    if to is PRIVATE:
        guest.convert(0, COUNT, SHARED)
    seen: list[set[int]] = []
    guest.ram.before_page = lambda page, _: seen.append(guest.mapped() & {page // PAGE})
    states: list[set[int]] = []
    inner = guest.ram.set_attributes

    def note_state(offset: int, size: int, private: bool) -> None:
        states.append(pages_in(attributes_of(guest.block).ranges(SHARED)))
        inner(offset, size, private)

    guest.ram.set_attributes = note_state  # type: ignore[method-assign]
    before = pages_in(attributes_of(guest.block).ranges(SHARED))
    guest.convert(2, 3, to)
    assert seen == [set()] * 3
    assert states == [before], "the states change last"
    assert guest.vm.calls == [], "the VM has no say"


def test_control_the_memory_itself_refuses_the_wrong_order(guest: Guest) -> None:
    guest.convert(0, COUNT, SHARED)
    with pytest.raises(BlockingIOError, match="page 0x2000 is pinned"):
        guest.ram.set_attributes(2 * PAGE, PAGE, True)


def test_each_attribute_is_set_by_whoever_holds_it() -> None:
    vm = RecordingVm()
    memory = GuestMemory(vm)
    iommu = SoftIommu()
    memory.attach(iommu)
    ram = SimulatedInPlace("second", 4 * PAGE, pinned_by=[iommu])
    with (
        RamBlock.create("first", 4 * PAGE, private="stand-in") as first,
        RamBlock.create("second", 4 * PAGE, private=ram) as second,
        RamBlock.create("third", 4 * PAGE, private="stand-in") as third,
    ):
        for number, block in enumerate((first, second, third)):
            memory.map(block, number * 4 * PAGE)
        assert vm.private == {0, 1, 2, 3, 8, 9, 10, 11}
        vm.take_calls()
        ram.calls.clear()
        result = memory.convert(2 * PAGE, 8 * PAGE, SHARED)
        assert result.changed_bytes == 8 * PAGE
        assert vm.take_calls() == [("shared", 2, 2), ("shared", 8, 2)]
        assert ram.calls == [(0, 4 * PAGE, False)]
        first.write(3 * PAGE, b"1")
        second.write(0, b"2")
        memory.convert(3 * PAGE, 2 * PAGE, PRIVATE)
        assert vm.take_calls() == [("private", 3, 1)]
        assert ram.calls[1:] == [(0, PAGE, True)]
        assert pages_of(iommu.mappings()) == {page * PAGE for page in (2, 5, 6, 7, 8, 9)}
        assert (first.allocated_bytes(), second.allocated_bytes()) == (0, PAGE)


# -- pins ------------------------------------------------------------------------------------------


def test_a_pin_that_goes_away_is_waited_out(guest: Guest) -> None:
    guest.convert(0, COUNT, SHARED)
    guest.ram.calls.clear()
    guest.ram.pin(3 * PAGE, PAGE)
    tried = 0

    def let_go(page: int, _: bool) -> None:
        nonlocal tried
        tried += page == 3 * PAGE
        if tried == TRIES:
            guest.ram.unpin(3 * PAGE, PAGE)

    guest.ram.before_page = let_go
    guest.convert(1, 4, PRIVATE)
    assert guest.private() == {1, 2, 3, 4}
    assert guest.mapped() == {0, 5, 6, 7}
    assert guest.ram.calls == [(PAGE, 4 * PAGE, True)] * TRIES


def test_the_second_try_is_enough_for_a_moments_hold(guest: Guest) -> None:
    guest.convert(0, COUNT, SHARED)
    guest.ram.before_page = stop_at(5, lambda: BlockingIOError(errno.EAGAIN, "held"))
    assert guest.memory.convert(BASE, COUNT * PAGE, PRIVATE).changed_bytes == COUNT * PAGE
    assert guest.private() == set(range(COUNT))


@pytest.mark.parametrize("first", [0, 2, 3])
def test_a_pin_that_stays_is_the_guests_eagain_and_nothing_has_changed(
    guest: Guest, first: int
) -> None:
    guest.convert(0, COUNT, SHARED)
    guest.ram.write_as_guest(0, b"x" * guest.ram.size)
    before = guest.picture()
    guest.ram.pin(3 * PAGE, PAGE)
    guest.ram.calls.clear()
    guest.recorder.calls.clear()
    with pytest.raises(ConversionError, match="step 'attribute' failed; nothing has changed") as no:
        guest.convert(first, 5, PRIVATE)
    cause = no.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EAGAIN
    assert "page 0x3000 is pinned" in str(cause)
    assert (no.value.step, no.value.rolled_back, no.value.target) == ("attribute", True, None)
    assert guest.picture() == before
    there, back = (first * PAGE, 5 * PAGE, True), (first * PAGE, 5 * PAGE, False)
    assert guest.ram.calls == [there] * TRIES + [back]
    assert [call[0] for call in guest.recorder.calls] == ["unmap", "map"]
    assert not guest.memory.poisoned
    guest.ram.unpin(3 * PAGE, PAGE)
    guest.convert(first, 5, PRIVATE)
    assert guest.private() == set(range(first, first + 5))


def test_what_is_pinned_may_become_shared_and_what_is_private_already_is_in_nobodys_way(
    guest: Guest,
) -> None:
    guest.ram.pin(0, COUNT * PAGE)
    guest.convert(0, 4, SHARED)
    guest.ram.unpin(0, 4 * PAGE)
    guest.convert(0, COUNT, PRIVATE)
    assert guest.private() == set(range(COUNT))


def test_a_device_that_does_not_let_go_is_a_refusal_of_the_device(guest: Guest) -> None:
    guest.convert(0, COUNT, SHARED)
    before = guest.picture()
    guest.ram.calls.clear()
    guest.target.fail_unmap = {guest.target.unmap_calls + 1}
    with pytest.raises(ConversionError) as caught:
        guest.convert(0, 2, PRIVATE)
    assert isinstance(caught.value.__cause__, DmaError)
    assert guest.picture() == before
    assert guest.ram.calls == []


# -- stopping half-way -----------------------------------------------------------------------------


def stop_at(
    number: int,
    error: Callable[[], BaseException],
    *,
    times: int = 1,
    private: bool | None = None,
) -> Callable[[int, bool], None]:
    """
    For ``before_page``: raise at page *number*, that many times, on the way to *private* or on both
    ways.
    """
    left = times

    def stop(page: int, to_private: bool) -> None:
        nonlocal left
        if page == number * PAGE and left and private in (None, to_private):
            left -= 1
            raise error()

    return stop


def no_memory() -> OSError:
    return OSError(errno.ENOMEM, "no memory for the attribute")


@pytest.mark.parametrize("to", [PRIVATE, SHARED])
@pytest.mark.parametrize("error", [no_memory, KeyboardInterrupt, ValueError])
def test_what_was_done_of_the_attribute_is_put_back(
    guest: Guest, to: PageState, error: Callable[[], BaseException]
) -> None:
    # A mixture: only what differed goes back.
    guest.convert(1, 3, SHARED)
    guest.convert(5, 1, SHARED)
    before = guest.picture()
    guest.ram.calls.clear()
    changing = [1, 2, 3, 5] if to is PRIVATE else [0, 4, 6, 7]
    for number in changing:
        guest.ram.before_page = stop_at(number, error)
        with pytest.raises((ConversionError, KeyboardInterrupt)) as caught:
            guest.convert(0, COUNT, to)
        raised = caught.value if error is KeyboardInterrupt else caught.value.__cause__
        assert isinstance(raised, error if isinstance(error, type) else OSError)
        assert guest.picture() == before
        assert guest.ram.calls[0] == (0, COUNT * PAGE, to is PRIVATE)
        assert pages_in(iter([call[:2] for call in guest.ram.calls[1:]])) == set(changing)
        guest.ram.calls.clear()
    guest.ram.before_page = None
    guest.convert(0, COUNT, to)


def test_only_pins_are_tried_again(guest: Guest) -> None:
    guest.ram.before_page = stop_at(2, no_memory)
    with pytest.raises(ConversionError):
        guest.convert(0, 4, SHARED)
    assert guest.ram.calls == [(0, 4 * PAGE, False), (0, 4 * PAGE, True)]


def test_if_it_cannot_be_put_back_the_memory_is_poisoned_and_nothing_is_mapped(
    guest: Guest,
) -> None:
    guest.convert(0, 4, SHARED)
    guest.ram.before_page = stop_at(2, no_memory)

    def refuse(offset: int, size: int, private: bool) -> None:
        if not private:
            raise OSError(errno.EIO, "it does not go back")
        SimulatedInPlace.set_attributes(guest.ram, offset, size, private)

    guest.ram.set_attributes = refuse  # type: ignore[method-assign]
    with pytest.raises(PoisonedError) as caught:
        guest.convert(0, 4, PRIVATE)
    assert isinstance(caught.value.__cause__, OSError)
    assert guest.mapped() == set()
    assert guest.private() == {0, 1, 4, 5, 6, 7}
    assert guest.memory.state(BASE + 3 * PAGE) is PRIVATE, "no device gets it any more"
    with pytest.raises(PoisonedError):
        guest.convert(0, 1, SHARED)


def test_a_pin_in_the_undo_is_tried_again_too(guest: Guest) -> None:
    # The device refuses what has just become shared, and by then somebody reads it.
    guest.target.fail_map = {guest.target.map_calls + 1}
    guest.ram.before_page = stop_at(
        1, lambda: BlockingIOError(errno.EAGAIN, "held"), times=TRIES - 1, private=True
    )
    before = guest.picture()
    with pytest.raises(ConversionError) as caught:
        guest.convert(0, 2, SHARED)
    assert isinstance(caught.value.__cause__, DmaError)
    assert guest.ram.calls == [(0, 2 * PAGE, False), *[(0, 2 * PAGE, True)] * TRIES]
    assert guest.picture() == before
    assert not guest.memory.poisoned


def test_a_pin_that_stays_in_the_undo_poisons(guest: Guest) -> None:
    guest.target.fail_map = {guest.target.map_calls + 1}
    guest.ram.pin(PAGE, PAGE)
    with pytest.raises(PoisonedError) as caught:
        guest.convert(0, 2, SHARED)
    assert isinstance(caught.value.__cause__, DmaError)
    assert guest.ram.calls == [(0, 2 * PAGE, False), *[(0, 2 * PAGE, True)] * TRIES]
    assert guest.mapped() == set()


# -- making, placing, closing ----------------------------------------------------------------------


def test_placing_sets_what_the_states_say_and_nothing_else() -> None:
    ram = SimulatedInPlace("ram", COUNT * PAGE)
    vm = RecordingVm()
    memory = GuestMemory(vm)
    with RamBlock.create("ram", COUNT * PAGE, private=ram) as block:
        attributes_of(block).state_change(2 * PAGE, 2 * PAGE, SHARED)
        assert ram.calls == []
        seen: list[set[int]] = []
        vm.then = lambda _: seen.append(pages_in(ram.private_ranges()))
        placed = memory.map(block, 0, offset=PAGE, size=4 * PAGE)
        assert ram.calls == [
            (PAGE, PAGE, True),
            (4 * PAGE, PAGE, True),
            (2 * PAGE, 2 * PAGE, False),
        ]
        assert vm.take_calls() == [("add", 0, 4)]
        assert seen == [{0, 1, 4, 5, 6, 7}], "before the slot"
        ram.calls.clear()
        memory.unmap(placed)
        assert vm.take_calls() == [("remove", 0, 4)]
        assert ram.calls == [], "they go with the memory"
        memory.map(block, 1 << 30)
        assert pages_in(ram.private_ranges()) == {0, 1, 4, 5, 6, 7}


def test_placing_is_refused_if_the_memory_refuses() -> None:
    ram = SimulatedInPlace("ram", COUNT * PAGE)
    ram.before_page = stop_at(3, no_memory)
    memory = GuestMemory(vm := RecordingVm())
    with RamBlock.create("ram", COUNT * PAGE, private=ram) as block:
        attributes_of(block).state_change(2 * PAGE, 2 * PAGE, SHARED)
        with pytest.raises(OSError, match="no memory for the attribute"):
            memory.map(block, 0)
        assert (memory.sections, vm.calls, block.placement) == ((), [], None)
        memory.map(block, 0)
        assert pages_in(ram.private_ranges()) == {0, 1, 4, 5, 6, 7}


def test_by_page_and_for_a_target_that_cannot_cut(guest: Guest) -> None:
    iommu = SoftIommu(exact=True)
    guest.memory.attach(iommu, MappingPolicy.PAGE)
    guest.ram.pinned_by = [guest.iommu, iommu]
    guest.convert(0, COUNT, SHARED)
    guest.convert(3, 2, PRIVATE)
    assert pages_of(iommu.mappings()) == pages_of(guest.iommu.mappings())
    assert guest.private() == {3, 4}


def test_it_is_closed_with_the_block() -> None:
    ram = SimulatedInPlace("in-place-closed", COUNT * PAGE)
    with RamBlock.create("ram", COUNT * PAGE, private=ram):
        assert "in-place-closed" in Path("/proc/self/maps").read_text()
    assert "in-place-closed" not in Path("/proc/self/maps").read_text()


def test_a_poisoned_block_keeps_it(guest: Guest) -> None:
    guest.convert(0, 2, SHARED)
    guest.block.write(PAGE, b"reachable")
    guest.target.short_unmap = range(100)  # the last page stays mapped
    with pytest.raises(PoisonedError):
        guest.convert(0, 2, PRIVATE)
    guest.block.close()
    assert guest.block.closed
    assert guest.iommu.read(BASE + PAGE, 9) == b"reachable"


@pytest.mark.parametrize("size", [PAGE, 3 * PAGE, 0, -PAGE, 100, None])
def test_it_is_all_of_the_block_or_nothing(size: int) -> None:
    ram = SimulatedInPlace("ram", 2 * PAGE)
    with pytest.raises(UsageError, match="block 'ram'"):
        RamBlock.create("ram", size, private=ram)
    assert ram.read_as_guest(0, 1) == b"\0", "still open, and the caller's"
    ram.close()


def test_there_is_no_memory_to_allocate_beside_it() -> None:
    ram = SimulatedInPlace("ram", 2 * PAGE)
    with pytest.raises(UsageError, match="is all the memory of its block") as caught:
        RamBlock.from_backend("ram", HostMemoryBackend(size=2 * PAGE), private=ram)
    assert caught.value.expected == "RamBlock.create"
    with pytest.raises(UsageError, match="is not a name"):
        RamBlock.create("r\0m", 2 * PAGE, private=ram)
    ram.close()


def test_what_sets_attributes_and_is_no_memory() -> None:
    class Incomplete:
        fd = 3
        size = PAGE

        def discard(self, offset: int, size: int) -> None: ...

        def set_attributes(self, offset: int, size: int, private: bool) -> None: ...

    with pytest.raises(UsageError, match="lacks address, page_size, read, write, allocated_bytes"):
        RamBlock.create("ram", PAGE, private=Incomplete())


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (1, PAGE), (0, COUNT * PAGE + PAGE), (0, 5)])
def test_the_simulated_memory_takes_whole_pages_of_itself(
    guest: Guest, offset: int, size: int
) -> None:
    with pytest.raises(UsageError, match="memory in place"):
        guest.ram.set_attributes(offset, size, True)


def test_one_memory_is_that_of_one_block() -> None:
    memory = SimulatedInPlace("ram", 4 * PAGE)
    with (
        RamBlock.create("a", 4 * PAGE, private=memory),
        pytest.raises(UsageError, match="all the memory of another block already"),
    ):
        RamBlock.create("b", 4 * PAGE, private=memory)
