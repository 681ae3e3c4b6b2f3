import errno
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE, PageSource, attributes_of, pages, runs
from ramblock import (
    BackendKind,
    GuestMemory,
    HostMemoryBackend,
    PageState,
    RamBlock,
    VirtioMem,
)
from ramblock.dma import SoftIommu
from ramblock.guest.freeing import Reclaimer
from ramblock.hostmem import MemfdBacking, StandInPrivate
from ramblock.units import MIB
from require import require_hugetlb

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


class FailingShared(MemfdBacking):
    """A shared side that frees nothing as long as it is told so."""

    fails: BaseException | None = None

    def discard(self, offset: int, size: int) -> None:
        if self.fails is not None:
            raise self.fails
        super().discard(offset, size)


class FailingPrivate(StandInPrivate):
    fails: BaseException | None = None

    def discard(self, offset: int, size: int) -> None:
        if self.fails is not None:
            raise self.fails
        super().discard(offset, size)


NO = OSError(errno.EINTR, "not now")


class Guest:
    def __init__(self) -> None:
        self.shared = FailingShared("ram", 16 * PAGE)
        self.private = FailingPrivate("ram", 16 * PAGE)
        self.block = RamBlock("ram", self.shared, self.private, owns_private=True)
        self.memory = GuestMemory()
        self.memory.map(self.block, 0)
        self.iommu = SoftIommu()
        self.memory.attach(self.iommu)
        self.private.write(0, b"p" * (16 * PAGE))

    def share(self, first: int, count: int) -> None:
        self.memory.convert(first * PAGE, count * PAGE, SHARED)
        self.block.write(first * PAGE, b"s" * (count * PAGE))

    def allocated(self) -> int:
        assert self.block.fd is not None
        return os.fstat(self.block.fd).st_blocks * 512


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.block.close()


def test_a_conversion_whose_freeing_fails_has_succeeded(guest: Guest) -> None:
    guest.share(0, 4)
    guest.shared.fails = NO
    result = guest.memory.convert(0, 2 * PAGE, PRIVATE)
    assert (result.changed_bytes, result.not_freed_bytes) == (2 * PAGE, 2 * PAGE)
    assert guest.memory.state(0) is PRIVATE
    assert not guest.memory.poisoned
    assert guest.block.not_freed_bytes == 2 * PAGE
    assert guest.allocated() == 4 * PAGE


def test_what_could_not_be_freed_is_freed_with_the_next_conversion(guest: Guest) -> None:
    guest.share(0, 4)
    guest.shared.fails = NO
    guest.memory.convert(0, PAGE, PRIVATE)
    guest.memory.convert(2 * PAGE, PAGE, PRIVATE)
    guest.shared.fails = None
    result = guest.memory.convert(3 * PAGE, PAGE, PRIVATE)
    assert result.not_freed_bytes == 0
    assert guest.block.not_freed_bytes == 0
    assert guest.allocated() == PAGE
    assert guest.block.read(PAGE, PAGE) == b"s" * PAGE


def test_or_when_somebody_asks(guest: Guest) -> None:
    guest.share(0, 2)
    guest.shared.fails = NO
    guest.memory.convert(0, 2 * PAGE, PRIVATE)
    assert guest.block.free_pending() == 2 * PAGE
    guest.shared.fails = None
    assert guest.block.free_pending() == 0
    assert guest.allocated() == 0


def test_the_private_side_has_an_account_too(guest: Guest) -> None:
    guest.private.fails = NO
    result = guest.memory.convert(0, 2 * PAGE, SHARED)
    assert (result.not_freed_bytes, guest.block.not_freed_bytes) == (2 * PAGE, 2 * PAGE)
    guest.private.fails = None
    assert guest.block.free_pending() == 0
    assert guest.private.allocated_bytes() == 14 * PAGE


# Each makes page 0 shared and populated again after its shared side could not be freed.
def by_conversion(guest: Guest) -> None:
    guest.memory.convert(0, PAGE, SHARED)


def by_state_change(guest: Guest) -> None:
    attributes_of(guest.block).state_change(0, PAGE, SHARED)


@pytest.mark.parametrize("back", [by_conversion, by_state_change])
def test_what_is_used_again_is_not_freed_behind_the_guests_back(
    guest: Guest, back: Callable[[Guest], None]
) -> None:
    guest.share(0, 2)
    guest.shared.fails = NO
    guest.memory.convert(0, 2 * PAGE, PRIVATE)
    back(guest)
    assert guest.block.not_freed_bytes == PAGE
    guest.iommu.write(0, b"written by a device")
    guest.shared.fails = None
    assert guest.block.free_pending() == 0
    assert guest.iommu.read(0, 19) == b"written by a device"
    assert guest.allocated() == PAGE


def test_the_same_through_sources_that_come_and_go(guest: Guest) -> None:
    # Unplugged and not freed; then virtio-mem goes, and with it the reason why nobody used the
    # pages.
    device = VirtioMem(guest.block, PAGE)
    guest.memory.convert(0, 2 * PAGE, SHARED)
    device.plug(0, 2 * PAGE)
    guest.iommu.write(0, b"s" * (2 * PAGE))
    guest.shared.fails = NO
    device.unplug(0, 2 * PAGE)
    assert guest.block.not_freed_bytes == 2 * PAGE
    guest.block.discard_manager.remove_source(device)
    assert guest.block.not_freed_bytes == 0
    guest.iommu.write(0, b"device")
    guest.shared.fails = None
    guest.block.free_pending()
    assert guest.iommu.read(0, 6) == b"device"


def test_a_source_in_between_does_not_hide_that_a_page_is_used_again(guest: Guest) -> None:
    source = PageSource(range(16))
    guest.block.discard_manager.add_source(source)
    guest.share(0, 2)
    guest.shared.fails = NO
    guest.memory.convert(0, 2 * PAGE, PRIVATE)
    source.populated.clear()
    guest.block.discard_manager.notify_discard(source, 0, 16 * PAGE)
    guest.memory.convert(0, PAGE, SHARED)
    source.populated.update(range(16))
    guest.block.discard_manager.notify_populate(source, 0, 16 * PAGE)
    guest.iommu.write(0, b"device")
    guest.shared.fails = None
    assert guest.block.free_pending() == 0
    assert guest.iommu.read(0, 6) == b"device"
    assert guest.allocated() == PAGE


def test_private_pages_that_are_used_again_are_kept(guest: Guest) -> None:
    guest.private.fails = NO
    guest.memory.convert(0, 2 * PAGE, SHARED)
    guest.memory.convert(0, PAGE, PRIVATE)
    assert guest.block.not_freed_bytes == PAGE
    guest.private.write(0, b"secret")
    guest.private.fails = None
    assert guest.block.free_pending() == 0
    assert guest.private.read(0, 6) == b"secret"


def test_ctrl_c_while_freeing_comes_out_and_nothing_is_forgotten(guest: Guest) -> None:
    guest.share(0, 2)
    guest.shared.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        guest.memory.convert(0, 2 * PAGE, PRIVATE)
    assert guest.memory.state(0) is PRIVATE
    assert not guest.memory.poisoned
    guest.shared.fails = None
    assert guest.block.not_freed_bytes == 2 * PAGE
    assert guest.block.free_pending() == 0
    assert guest.allocated() == 0


def test_unplugging_frees_both_sides_and_accounts_for_both(guest: Guest) -> None:
    device = VirtioMem(guest.block, PAGE)
    assert guest.private.allocated_bytes() == guest.allocated() == 0
    device.plug(0, 8 * PAGE)
    guest.share(0, 4)
    guest.private.write(4 * PAGE, b"p" * (4 * PAGE))
    guest.shared.fails = guest.private.fails = NO
    device.unplug_all()
    # At least the side of each page that holds something, at most both sides of what was asked for.
    assert 8 * PAGE <= guest.block.not_freed_bytes <= 2 * 16 * PAGE
    guest.shared.fails = guest.private.fails = None
    assert guest.block.free_pending() == 0
    assert guest.private.allocated_bytes() == guest.allocated() == 0


def test_what_is_plugged_again_does_not_wait_any_more(guest: Guest) -> None:
    device = VirtioMem(guest.block, PAGE)
    device.plug(0, 4 * PAGE)
    guest.shared.fails = guest.private.fails = NO
    device.unplug(0, 4 * PAGE)
    waited = guest.block.not_freed_bytes
    device.plug(0, 4 * PAGE)
    guest.private.write(0, b"secret")
    assert guest.block.not_freed_bytes == waited - 4 * PAGE
    guest.shared.fails = guest.private.fails = None
    assert guest.block.free_pending() == 0
    assert guest.private.read(0, 6) == b"secret"


# -- the account itself ----------------------------------------------------------------------------


class Memory:
    """One side of a block of sixteen pages, as sets of pages, and what a reclaimer does to it."""

    COUNT = 16

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.used: set[int] = set()
        self.dirty: set[int] = set()
        self.fails = False
        self.calls: list[tuple[int, int]] = []
        self.reclaimer = Reclaimer(
            "test", self.COUNT * PAGE, unit * PAGE, self.discard, self.used_runs
        )

    def used_runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for offset, size in runs(self.used & pages(start, end - start)):
            yield offset, offset + size

    def discard(self, offset: int, size: int) -> None:
        self.calls.append((offset // PAGE, size // PAGE))
        assert offset % (self.unit * PAGE) == 0
        assert size % (self.unit * PAGE) == 0
        assert not pages(offset, size) & self.used, "freed what is in use"
        if self.fails:
            raise OSError(errno.EINTR, "not now")
        self.dirty -= pages(offset, size)

    def use(self, first: int, count: int) -> None:
        numbers = pages(first * PAGE, count * PAGE)
        self.used |= numbers
        self.dirty |= numbers
        self.reclaimer.keep_used(first * PAGE, count * PAGE)

    def free(self, first: int, count: int) -> int:
        self.used -= pages(first * PAGE, count * PAGE)
        return self.reclaimer.free(first * PAGE, count * PAGE)

    @property
    def waiting(self) -> set[int]:
        found = self.reclaimer._pending.runs(0, self.COUNT)
        return {number for start, end in found for number in range(start, end)}

    def check(self) -> None:
        assert self.reclaimer.not_freed_bytes == len(self.waiting) * PAGE
        assert not self.waiting & self.used
        # Nothing that is there and unused is forgotten.
        assert self.dirty - self.used <= self.waiting


steps = st.lists(
    st.tuples(
        st.sampled_from(["use", "free", "fail", "work", "pending"]),
        st.integers(0, Memory.COUNT - 1),
        st.integers(1, Memory.COUNT),
    ),
    max_size=30,
)


@pytest.mark.parametrize("unit", [1, 4])
@given(steps=steps)
def test_nothing_used_is_freed_and_nothing_unused_forgotten(
    unit: int, steps: list[tuple[str, int, int]]
) -> None:
    memory = Memory(unit)
    for what, first, length in steps:
        count = min(length, Memory.COUNT - first)
        if what == "use":
            memory.use(first, count)
        elif what == "free":
            left = memory.free(first, count)
            assert left == len(memory.waiting & set(range(first, first + count))) * PAGE
        elif what == "pending":
            assert memory.reclaimer.free_pending() == len(memory.waiting) * PAGE
        else:
            memory.fails = what == "fail"
        memory.check()
    memory.fails = False
    memory.reclaimer.free_pending()
    memory.check()
    # What still waits shares its huge page with something in use.
    for number in memory.waiting:
        start = number // unit * unit
        assert memory.used & set(range(start, start + unit))
    for number in range(Memory.COUNT):
        memory.free(number, 1)
    assert (memory.dirty, memory.reclaimer.not_freed_bytes) == (set(), 0)


def test_one_free_tries_only_a_few_earlier_failures_again() -> None:
    # The work of one request of the guest must not grow with the guest's history.
    memory = Memory(1)
    memory.use(0, 16)
    memory.fails = True
    for number in range(14):
        memory.free(number, 1)
    memory.calls.clear()
    memory.free(15, 1)
    assert 1 <= len(memory.calls) <= 5
    memory.fails = False
    memory.calls.clear()
    memory.free(15, 1)
    assert len(memory.calls) <= 5


def test_a_failure_is_not_tried_again_at_once() -> None:
    memory = Memory(1)
    memory.use(0, 2)
    memory.fails = True
    assert memory.free(0, 1) == PAGE
    assert memory.calls == [(0, 1)]


def test_no_failure_waits_behind_one_that_fails_again() -> None:
    memory = Memory(1)
    memory.use(0, 16)
    memory.fails = True
    failed = range(0, 12, 2)
    for number in failed:
        memory.free(number, 1)
    memory.calls.clear()
    memory.free(14, 1)
    memory.free(15, 1)
    assert {first for first, _ in memory.calls} >= set(failed)


def test_all_parts_of_a_failure_have_their_turn() -> None:
    memory = Memory(1)
    memory.use(0, 16)
    memory.fails = True
    memory.free(0, 7)
    memory.use(2, 1)
    memory.use(5, 1)
    memory.fails = False
    for number in (13, 14, 15):
        memory.free(number, 1)
    assert memory.waiting == set()
    assert memory.dirty & set(range(7)) == {2, 5}


def test_what_is_used_again_without_a_word_is_kept() -> None:
    """A source may change its mind and tell nobody: it is asked before anything is freed."""
    memory = Memory(1)
    memory.use(0, 16)
    memory.fails = True
    memory.free(0, 3)
    memory.used.add(1)
    memory.fails = False
    memory.free(15, 1)
    memory.reclaimer.free_pending()
    assert 1 in memory.dirty
    assert {0, 2} & memory.dirty == set()


def test_every_failure_has_its_turn() -> None:
    memory = Memory(1)
    memory.use(0, 16)
    memory.fails = True
    for number in range(0, 12, 2):
        memory.free(number, 1)
    assert len(memory.waiting) == 6
    memory.fails = False
    memory.calls.clear()
    memory.free(15, 1)
    assert memory.calls[0] == (15, 1)  # what was asked for comes first
    assert len(memory.waiting) == 2
    memory.free(14, 1)
    assert memory.waiting == set()


def test_only_whole_huge_pages_are_freed() -> None:
    memory = Memory(4)
    memory.use(0, 16)
    assert memory.free(2, 8) == 4 * PAGE
    assert memory.calls == [(4, 4)]
    assert memory.waiting == {2, 3, 8, 9}
    memory.calls.clear()
    assert memory.free(10, 2) == 0
    assert memory.calls == [(8, 4)]
    assert memory.waiting == {2, 3}
    memory.use(3, 1)
    assert memory.waiting == {2}
    assert memory.free(0, 2) == 2 * PAGE
    assert memory.free(3, 1) == 0
    assert memory.waiting == set()


# -- huge pages for real ---------------------------------------------------------------------------


@require_hugetlb
def test_a_part_of_a_huge_page_waits_for_the_rest_of_it() -> None:
    backend = HostMemoryBackend(size=6 * MIB, kind=BackendKind.HUGETLB, page_size=2 * MIB)
    memory = GuestMemory()
    with RamBlock.from_backend("ram", backend, private="stand-in") as block:
        memory.map(block, 0)
        iommu = SoftIommu()
        memory.attach(iommu)
        memory.convert(0, 6 * MIB, SHARED)
        iommu.write(0, b"x" * (6 * MIB))
        assert block.allocated_bytes() == 6 * MIB
        # The second half of the first, all of the second, the first half of the third.
        result = memory.convert(MIB, 4 * MIB, PRIVATE)
        assert result.not_freed_bytes == 2 * MIB == block.not_freed_bytes
        assert block.allocated_bytes() == 4 * MIB
        assert iommu.read(MIB - 1, 1) == b"x"
        # The rest of the first becomes private: now all of it goes.
        result = memory.convert(0, MIB, PRIVATE)
        assert (result.not_freed_bytes, block.not_freed_bytes) == (0, MIB)
        assert block.allocated_bytes() == 2 * MIB
        # What waited comes back into use, and is what it was.
        memory.convert(4 * MIB, MIB, SHARED)
        assert block.not_freed_bytes == 0
        assert iommu.read(4 * MIB, 2 * MIB) == b"x" * (2 * MIB)
        assert block.free_pending() == 0
        assert block.allocated_bytes() == 2 * MIB


@require_hugetlb
def test_huge_pages_and_virtio_mem() -> None:
    backend = HostMemoryBackend(size=4 * MIB, kind=BackendKind.HUGETLB, page_size=2 * MIB)
    with RamBlock.from_backend("ram", backend) as block:
        device = VirtioMem(block, MIB)
        device.plug(0, 4 * MIB)
        block.write(0, b"x" * (4 * MIB))
        device.unplug(0, MIB)
        assert (block.allocated_bytes(), block.not_freed_bytes) == (4 * MIB, MIB)
        device.unplug(MIB, MIB)
        assert (block.allocated_bytes(), block.not_freed_bytes) == (2 * MIB, 0)
        device.unplug_all()
        assert block.allocated_bytes() == 0
