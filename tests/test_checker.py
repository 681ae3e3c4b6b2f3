"""The checker finds nothing in a guest that behaves, and what is wrong in one that does not."""

from __future__ import annotations

import pytest

from ramblock import GuestMemory, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import HostRange, SoftIommu
from ramblock.errors import ConversionError
from ramblock.hostmem import MemfdBacking, StandInPrivate
from ramblock.testing import (
    CheckedInPlace,
    FaultyTarget,
    GuestChecker,
    SimulatedInPlace,
    pages_of,
)

PAGE = 4096
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


class Bench:
    """A guest of eight pages with everything under watch."""

    def __init__(self) -> None:
        self.checker = GuestChecker()
        self.iommu = SoftIommu()
        self.vm = self.checker.vm()
        self.target = self.checker.target(self.iommu)
        self.shared = self.checker.shared(MemfdBacking("ram", 8 * PAGE))
        stand_in = StandInPrivate("ram", 8 * PAGE)
        self.private = self.checker.private(stand_in)
        self.block = RamBlock("ram", self.shared, self.private, owns_private=False)
        self.shared.block = self.private.block = self.block

    def host(self, first: int, count: int) -> HostRange:
        return HostRange(
            self.shared.fd, first * PAGE, self.shared.address + first * PAGE, count * PAGE
        )

    def violations(self) -> str:
        return "\n".join(self.checker.violations)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_guest_that_behaves(bench: Bench) -> None:
    memory = GuestMemory(bench.vm)
    memory.map(bench.block, 0)
    mapper = memory.attach(bench.target)
    device = VirtioMem(bench.block, PAGE)
    device.plug(0, 6 * PAGE)
    memory.convert(PAGE, 6 * PAGE, SHARED)
    bench.block.write(PAGE, b"device")
    assert bench.shared.read(PAGE, 6) == b"device"
    memory.convert(2 * PAGE, PAGE, PRIVATE)
    device.unplug(4 * PAGE, PAGE)
    assert pages_of(bench.iommu.mappings()) == {PAGE, 3 * PAGE, 5 * PAGE}
    assert bench.checker.private_pages == {0, 2 * PAGE, 7 * PAGE}
    memory.detach(mapper)
    bench.block.close()
    bench.checker.verify()
    assert bench.checker.calls > 5


def test_a_failure_that_is_put_back_is_no_violation(bench: Bench) -> None:
    memory = GuestMemory(bench.vm)
    memory.map(bench.block, 0)
    memory.attach(FaultyTarget(bench.target, fail_map=[2]))
    memory.convert(0, PAGE, SHARED)
    with pytest.raises(ConversionError, match="nothing has changed"):
        memory.convert(2 * PAGE, PAGE, SHARED)
    bench.checker.verify()
    bench.block.close()


def test_mapping_a_private_page(bench: Bench) -> None:
    bench.vm.set_memory_attributes(0, 4 * PAGE, True)
    bench.vm.set_memory_attributes(PAGE, PAGE, False)
    bench.target.map(PAGE, bench.host(1, 1))
    bench.checker.verify()
    bench.target.map(2 * PAGE, bench.host(2, 1))
    assert "a private page is mapped by SoftIommu 1: [0x2000, 0x3000)" in bench.violations()
    with pytest.raises(AssertionError, match="private page is mapped"):
        bench.checker.verify()


def test_making_a_mapped_page_private(bench: Bench) -> None:
    bench.target.map(0, bench.host(0, 4))
    bench.vm.set_memory_attributes(3 * PAGE, 2 * PAGE, True)
    assert "a private page is mapped by SoftIommu 1: [0x3000, 0x4000)" in bench.violations()


def test_a_page_whose_attribute_failed_to_change_counts_as_private() -> None:
    class Refusing:
        def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
            raise OSError("no")

    checker = GuestChecker()
    vm = checker.vm(Refusing())
    for private in (True, False):
        with pytest.raises(OSError, match="no"):
            vm.set_memory_attributes(0, PAGE, private)
    assert checker.private_pages == {0}


def test_freeing_a_mapped_page(bench: Bench) -> None:
    bench.target.map(16 * PAGE, bench.host(0, 4))
    bench.shared.block = RamBlock.create("unplaced", 8 * PAGE, private="stand-in")
    bench.shared.discard(4 * PAGE, PAGE)
    bench.checker.verify()
    bench.shared.discard(3 * PAGE, PAGE)
    assert "a freed page is mapped by SoftIommu 1: [0x13000, 0x14000)" in bench.violations()
    # What is mapped anew is memory anew.
    bench.target.unmap(16 * PAGE, 4 * PAGE)
    bench.checker.violations.clear()
    bench.target.map(16 * PAGE, bench.host(0, 4))
    bench.checker.verify()


def test_freeing_what_is_in_use(bench: Bench) -> None:
    attributes = bench.block.attributes
    assert attributes is not None
    attributes.state_change(0, PAGE, SHARED)
    bench.private.discard(0, PAGE)
    bench.shared.discard(PAGE, PAGE)
    bench.checker.verify()
    bench.private.discard(0, 2 * PAGE)
    assert "free of the private side of <RamBlock" in bench.violations()
    bench.checker.violations.clear()
    bench.shared.discard(0, 2 * PAGE)
    assert "a page in use was freed" in bench.violations()


def test_freeing_what_virtio_mem_has_unplugged_is_fine(bench: Bench) -> None:
    VirtioMem(bench.block, PAGE)
    bench.private.discard(0, 8 * PAGE)
    bench.shared.discard(0, 8 * PAGE)
    bench.checker.verify()


@pytest.fixture
def in_place(bench: Bench) -> CheckedInPlace:
    """
    Eight pages in place beside the others.

    Nobody pins them, so that they can be treated wrongly.
    """
    memory = bench.checker.in_place(SimulatedInPlace("in-place", 8 * PAGE))
    memory.block = bench.block = RamBlock.create("in-place", 8 * PAGE, private=memory)
    return memory


def test_mapping_a_page_that_is_private_in_place(bench: Bench, in_place: CheckedInPlace) -> None:
    in_place.set_attributes(0, 2 * PAGE, False)
    bench.target.map(0, HostRange(in_place.fd, 0, in_place.address, 2 * PAGE))
    bench.checker.verify()
    bench.target.map(4 * PAGE, HostRange(in_place.fd, 2 * PAGE, in_place.address + 2 * PAGE, PAGE))
    assert "a private page is mapped by SoftIommu 1: [0x4000, 0x5000)" in bench.violations()


def test_making_a_mapped_page_private_in_place(bench: Bench, in_place: CheckedInPlace) -> None:
    in_place.set_attributes(0, 2 * PAGE, False)
    bench.target.map(16 * PAGE, HostRange(in_place.fd, 0, in_place.address, 2 * PAGE))
    in_place.set_attributes(PAGE, PAGE, True)
    assert "a private page is mapped by SoftIommu 1: [0x11000, 0x12000)" in bench.violations()


def test_an_attribute_in_place_that_failed_to_change_counts_as_private(
    bench: Bench, in_place: CheckedInPlace
) -> None:
    assert isinstance(in_place.inner, SimulatedInPlace)
    for private in (False, True):
        in_place.inner.pin(0, PAGE)
        if private:
            with pytest.raises(BlockingIOError):
                in_place.set_attributes(0, PAGE, True)
        else:
            in_place.set_attributes(0, PAGE, False)
        assert (in_place.address in bench.checker.private_memory) is private


def test_freeing_in_place_what_the_guest_has(bench: Bench, in_place: CheckedInPlace) -> None:
    in_place.discard(0, PAGE)
    assert "a page in use was freed" in bench.violations()
    bench.checker.violations.clear()
    device = VirtioMem(bench.block, PAGE)
    device.plug(PAGE, PAGE)
    bench.checker.verify()
    in_place.discard(2 * PAGE, 2 * PAGE)
    bench.checker.verify()
    in_place.discard(PAGE, 2 * PAGE)
    assert "a page in use was freed" in bench.violations()


def test_a_guest_in_place_that_behaves(bench: Bench, in_place: CheckedInPlace) -> None:
    memory = GuestMemory(bench.vm)
    memory.map(bench.block, 0)
    mapper = memory.attach(bench.target)
    memory.convert(PAGE, 6 * PAGE, SHARED)
    bench.block.write(PAGE, b"device")
    assert in_place.read(PAGE, 6) == b"device"
    memory.convert(2 * PAGE, PAGE, PRIVATE)
    assert bench.checker.private_pages == set()
    memory.detach(mapper)
    bench.block.close()
    bench.checker.verify()


def test_closing_what_is_mapped(bench: Bench) -> None:
    bench.target.map(0, bench.host(0, 1))
    bench.shared.close()
    assert "a freed page is mapped" in bench.violations()


def test_slots_are_passed_on() -> None:
    class Slots:
        def __init__(self) -> None:
            self.heard: list[str] = []

        def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
            self.heard.append(f"{'private' if private else 'shared'} {gpa:#x}")

        def add_memory_slot(self, section: RamSection) -> None:
            self.heard.append(f"slot {section.gpa:#x}")

        def remove_memory_slot(self, section: RamSection) -> None:
            self.heard.append(f"no slot {section.gpa:#x}")

    checker, vm = GuestChecker(), Slots()
    memory = GuestMemory(checker.vm(vm))
    with RamBlock.create("ram", PAGE, private="stand-in") as block:
        memory.unmap(memory.map(block, PAGE))
    assert vm.heard == ["private 0x1000", "slot 0x1000", "no slot 0x1000", "shared 0x1000"]
    checker.verify()


def test_text_and_the_rest_of_the_target(bench: Bench) -> None:
    assert bench.target.capabilities is bench.iommu.capabilities
    assert repr(bench.checker) == "<GuestChecker: 0 calls, 0 violations>"
    assert "SoftIommu" in repr(bench.target)
    assert bench.shared.allocated_bytes() == 0
    bench.target.map(0, bench.host(0, 1))
    bench.target.close()
    assert bench.iommu.mappings() == []
