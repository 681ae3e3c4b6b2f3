from itertools import product

import pytest

from doubles import PAGE, RecordingListener, RefusalError, section
from ramblock import GuestMemory, RamBlock, VirtioMem
from ramblock.discard import DiscardCoordinator, HoldKind
from ramblock.dma import HostRange, SoftIommu
from ramblock.errors import BusyError

COORDINATED = HoldKind.REQUIRE_COORDINATED
UNCOORDINATED = HoldKind.REQUIRE_UNCOORDINATED
NONE_AT_ALL = HoldKind.FORBID_ALL
NOT_UNCOORDINATED = HoldKind.FORBID_UNCOORDINATED

# Who may stand beside whom: everybody beside his own kind, and these.
TOLERATES = {
    (COORDINATED, UNCOORDINATED),
    (COORDINATED, NOT_UNCOORDINATED),
    (NONE_AT_ALL, NOT_UNCOORDINATED),
}


@pytest.mark.parametrize(("first", "second"), list(product(HoldKind, HoldKind)))
def test_who_may_stand_beside_whom(first: HoldKind, second: HoldKind) -> None:
    coordinator = DiscardCoordinator()
    held = coordinator.hold("one", first)
    if first is second or {(first, second), (second, first)} & TOLERATES:
        other = coordinator.hold("two", second)
        assert coordinator.holds == (held, other)
        return
    with pytest.raises(BusyError, match=r"two .*, but one ") as caught:
        coordinator.hold("two", second)
    assert first.value in str(caught.value)
    assert second.value in str(caught.value)
    assert coordinator.holds == (held,)
    held.release()
    coordinator.hold("two", second)


def test_a_claim_says_whose_it_is() -> None:
    hold = DiscardCoordinator().hold("me", NONE_AT_ALL)
    assert (hold.kind, hold.owner) == (NONE_AT_ALL, "me")
    assert repr(hold) == "<DiscardHold: me forbids all discards>"


def test_each_claim_of_one_user_counts() -> None:
    coordinator = DiscardCoordinator()
    one, two = coordinator.hold("pinning", NONE_AT_ALL), coordinator.hold("pinning", NONE_AT_ALL)
    one.release()
    with pytest.raises(BusyError):
        coordinator.hold("conversions", COORDINATED)
    two.release()
    coordinator.hold("conversions", COORDINATED)


def test_giving_back_twice_is_the_same_as_once() -> None:
    coordinator = DiscardCoordinator()
    with coordinator.hold("pinning", NONE_AT_ALL) as hold:
        hold.release()
        again = coordinator.hold("pinning", NONE_AT_ALL)
    assert coordinator.holds == (again,)


def test_a_confidential_block_converts_and_so_forbids_pinning() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", PAGE, private="stand-in") as block:
        memory.map(block, 0)
        with pytest.raises(BusyError, match="page conversion of block 'ram'"):
            memory.discards.hold("pinning", NONE_AT_ALL)
    memory.discards.hold("pinning", NONE_AT_ALL)  # the block is closed


def test_pinning_forbids_a_confidential_block_but_not_ordinary_memory() -> None:
    memory = GuestMemory()
    hold = memory.discards.hold("pinning", NONE_AT_ALL)
    with (
        RamBlock.create("private", PAGE, private="stand-in") as private,
        RamBlock.create("ordinary", PAGE) as ordinary,
    ):
        memory.map(ordinary, PAGE)
        with pytest.raises(BusyError, match="pinning"):
            memory.map(private, 0)
        with pytest.raises(BusyError, match="pinning"):
            VirtioMem(ordinary, PAGE)
        # Nothing has changed: the block is still free to go elsewhere.
        assert [section.block for section in memory.sections] == [ordinary]
        assert memory.discards.holds == (hold,)
        GuestMemory().map(private, 0)
        assert ordinary.discard_manager.sources == ()


def test_a_balloon_and_a_mapper_exclude_each_other() -> None:
    memory = GuestMemory()
    with memory.discards.hold("balloon", UNCOORDINATED):
        with pytest.raises(BusyError, match="balloon"):
            memory.attach(SoftIommu())
        assert memory.mappers == ()
    mapper = memory.attach(SoftIommu())
    with pytest.raises(BusyError, match="DMA mapper"):
        memory.discards.hold("balloon", UNCOORDINATED)
    memory.detach(mapper)
    memory.discards.hold("balloon", UNCOORDINATED).release()


def test_a_refused_attach_holds_nothing() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 2 * PAGE) as block:
        memory.map(block, 0)
        target = SoftIommu()
        target.map(0, HostRange(block.fd, 0, block.address, PAGE))
        with pytest.raises(OSError, match="mapped"):
            memory.attach(target)
        assert memory.discards.holds == ()


def test_conversions_and_a_mapper_live_together() -> None:
    # What QEMU commit 852f0048f3 forbade, because nobody told VFIO; here somebody does.
    memory = GuestMemory()
    with RamBlock.create("ram", PAGE, private="stand-in") as block:
        memory.map(block, 0)
        memory.attach(SoftIommu())
        kinds = [hold.kind for hold in memory.discards.holds]
        assert kinds == [COORDINATED, NOT_UNCOORDINATED]


def test_claims_move_with_their_block() -> None:
    memory = GuestMemory()
    with RamBlock.create("ram", 2 * PAGE) as block:
        device = VirtioMem(block, PAGE)
        own = block.guard.discards
        section = memory.map(block, 0)
        assert (own.holds, len(memory.discards.holds)) == ((), 1)
        memory.unmap(section)
        assert (len(block.guard.discards.holds), memory.discards.holds) == (1, ())
        memory.map(block, 0)
        block.discard_manager.remove_source(device)
        assert memory.discards.holds == ()


def test_virtio_mem_that_comes_back_claims_again() -> None:
    with RamBlock.create("ram", 2 * PAGE) as block:
        device = VirtioMem(block, PAGE)
        block.discard_manager.remove_source(device)
        with block.guard.discards.hold("pinning", NONE_AT_ALL):
            with pytest.raises(BusyError, match="pinning"):
                block.discard_manager.add_source(device)
            assert block.discard_manager.sources == ()
        block.discard_manager.add_source(device)
        with pytest.raises(BusyError, match="virtio-mem"):
            block.guard.discards.hold("pinning", NONE_AT_ALL)
        device.plug(0, PAGE)


def test_a_virtio_mem_that_was_refused_claims_nothing() -> None:
    with RamBlock.create("ram", 2 * PAGE) as block:
        listener = RecordingListener()
        block.discard_manager.register_listener(listener, section(block))
        listener.refuse_all("discard")
        with pytest.raises(RefusalError):
            VirtioMem(block, PAGE)
        assert block.guard.discards.holds == ()
        assert block.discard_manager.holds == []
