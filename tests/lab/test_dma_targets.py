"""
The three kinds of real targets as targets: what they answer, and what a device reaches afterwards.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_devices import BASE, Rig, Way, entry_limit, host_range, open_rig
from ramblock import BackendKind, HostMemoryBackend, RamBlock
from ramblock.dma import HostRange, IommufdIoas, IommufdMode, Type1Container
from ramblock.dma.kernel_errors import KernelRefusal
from ramblock.errors import DmaError
from ramblock.testing.conformance import check_target
from ramblock.units import MIB, PAGE_SIZE

every_way = pytest.mark.parametrize("rig", list(Way), ids=lambda way: way.value, indirect=True)
only_type1 = pytest.mark.parametrize("rig", [Way.TYPE1], ids=lambda way: way.value, indirect=True)
only_native = pytest.mark.parametrize("rig", [Way.NATIVE], ids=lambda way: way.value, indirect=True)
only_cutting = pytest.mark.parametrize(
    "rig", [Way.CUTTING], ids=lambda way: way.value, indirect=True
)
only_iommufd = pytest.mark.parametrize(
    "rig", [Way.NATIVE, Way.CUTTING], ids=lambda way: way.value, indirect=True
)


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", MIB) as block:
        yield block


def host(block: RamBlock, first: int = 0, count: int = 1) -> HostRange:
    return host_range(block.fd, block.address, first, count)


# -- all of them -----------------------------------------------------------------------------------


@every_way
def test_what_it_says_it_can(rig: Rig, lab_iommu: str) -> None:
    capabilities = rig.target.capabilities
    assert capabilities.page_size == PAGE_SIZE
    assert capabilities.cut == (rig.way is Way.CUTTING)
    assert capabilities.exact == (rig.way is Way.NATIVE)
    assert (capabilities.max_mappings is None) == (rig.way is not Way.TYPE1)
    ranges = capabilities.iova_ranges
    assert ranges is not None
    # Interrupts of x86 go to [0xfee00000, 0xfef00000): no IOMMU translates there.
    assert all(end <= 0xFEE0_0000 or start >= 0xFEF0_0000 for start, end in ranges)
    assert any(start <= BASE < end for start, end in ranges)


@every_way
def test_it_is_a_target_like_any_other(rig: Rig) -> None:
    # The container has the device, and there is only the one.
    check_target(
        lambda: rig.target, reaches=lambda _, iova: rig.reaches(iova), reuse=True, examples=6
    )
    assert rig.reached(16) == set()


@every_way
def test_refusals_do_nothing_and_say_why(rig: Rig, block: RamBlock) -> None:
    target = rig.target
    target.map(BASE, host(block, 0, 2))
    cases: list[tuple[int, HostRange, int, str]] = [
        (BASE + PAGE_SIZE, host(block), errno.EEXIST, "mapped already"),
        (BASE + 1, host(block), errno.EINVAL, "0x100000001"),
        (0xFEE0_0000, host(block), errno.EINVAL, "usable: [0x0, 0xfee00000)"),
        (BASE + MIB, HostRange(None, 0, 0x1000, PAGE_SIZE), errno.EFAULT, "not mapped"),
    ]
    for iova, memory, number, text in cases:
        with pytest.raises(DmaError) as caught:
            target.map(iova, memory)
        assert (caught.value.errno, caught.value.in_doubt) == (number, False)
        assert (caught.value.iova, caught.value.size) == (iova, memory.size)
        assert text in str(caught.value)
    assert rig.reached(4) == {0, 1}


@every_way
def test_nothing_is_mapped_past_what_the_iommu_reaches(rig: Rig, block: RamBlock) -> None:
    ranges = rig.target.capabilities.iova_ranges
    assert ranges is not None
    end = ranges[-1][1]
    rig.target.map(end - PAGE_SIZE, host(block))
    assert rig.reaches(end - PAGE_SIZE)
    with pytest.raises(DmaError) as caught:
        rig.target.map(end, host(block))
    assert caught.value.errno == errno.EINVAL


@every_way
def test_an_unmap_over_several_mappings_and_holes(rig: Rig, block: RamBlock) -> None:
    for page in (0, 1, 4):
        rig.target.map(BASE + page * PAGE_SIZE, host(block, page))
    assert rig.target.unmap(BASE, 8 * PAGE_SIZE) == 3 * PAGE_SIZE
    assert rig.reached(8) == set()


@every_way
def test_what_is_unmapped_is_not_reached_even_if_it_was_just_now(rig: Rig, block: RamBlock) -> None:
    # The IOMMU has it in its cache then.
    for _ in range(200):
        rig.target.map(BASE, host(block))
        assert rig.reaches(BASE)
        rig.target.unmap(BASE, PAGE_SIZE)
        assert not rig.reaches(BASE)


@every_way
def test_a_page_that_is_freed_and_mapped_again_is_the_new_one(rig: Rig) -> None:
    # A pinned page outlives the hole that is punched behind it: the mapper unmaps first, and this
    # is why.
    with RamBlock.create("ram", MIB, private="stand-in") as block:
        rig.target.map(BASE, host(block))
        rig.target.unmap(BASE, PAGE_SIZE)
        block.shared.discard(0, PAGE_SIZE)
        rig.target.map(BASE, host(block))
        assert rig.reaches(BASE)
        assert block.read(0, 4) == rig.testdev.pattern(4)


# -- type1 -----------------------------------------------------------------------------------------


@only_type1
def test_type1_counts(rig: Rig, block: RamBlock) -> None:
    target = rig.target
    assert isinstance(target, Type1Container)
    limit = target.capabilities.max_mappings
    assert limit == target.available == 65535
    target.map(BASE, host(block, 0, 8))
    target.map(BASE + MIB, host(block))
    assert target.available == limit - 2
    assert target.capabilities.max_mappings == limit
    target.unmap(BASE, 2 * MIB)
    assert target.available == limit


@only_type1
def test_type1_cannot_cut(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host(block, 0, 8))
    for first, count in ((0, 4), (2, 4), (4, 4), (4, 8)):
        with pytest.raises(DmaError, match="would cut") as caught:
            rig.target.unmap(BASE + first * PAGE_SIZE, count * PAGE_SIZE)
        assert (caught.value.errno, caught.value.in_doubt) == (errno.EINVAL, False)
    assert rig.reached(8) == set(range(8))
    assert rig.target.unmap(BASE - 4 * PAGE_SIZE, 16 * PAGE_SIZE) == 8 * PAGE_SIZE
    assert rig.target.unmap(BASE, PAGE_SIZE) == 0


def test_type1_limit_is_sampled_when_the_iommu_comes(block: RamBlock) -> None:
    with entry_limit(8), open_rig(Way.TYPE1) as rig:
        target = rig.target
        assert isinstance(target, Type1Container)
        with entry_limit(4):
            assert target.capabilities.max_mappings == 8
            for page in range(8):
                target.map(BASE + page * PAGE_SIZE, host(block, page))
            assert target.available == 0
            with pytest.raises(
                DmaError, match="dma_entry_limit is 4 now; a container keeps"
            ) as caught:
                target.map(BASE + MIB, host(block))
        assert caught.value.errno == errno.ENOSPC
        assert rig.reached(9) == set(range(8))


# -- iommufd ---------------------------------------------------------------------------------------


def test_iommufd_cuts_on_this_kernel() -> None:
    target = IommufdIoas()
    assert target.mode is IommufdMode.CUTTING
    assert target.why_native is None
    target.close()


@only_native
def test_native_unmaps_whole_areas(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host(block, 0, 4))
    for first, count in ((0, 1), (1, 1), (1, 4)):
        with pytest.raises(DmaError) as caught:
            rig.target.unmap(BASE + first * PAGE_SIZE, count * PAGE_SIZE)
        assert caught.value.errno == errno.ENOENT
        # A range of one page touches one area; of more, it cannot be told from the answer.
        assert caught.value.in_doubt == (count > 1)
    assert rig.reached(4) == set(range(4))
    assert rig.target.unmap(BASE, 4 * PAGE_SIZE) == 4 * PAGE_SIZE
    with pytest.raises(DmaError) as caught:
        rig.target.unmap(BASE, PAGE_SIZE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.ENOENT, False)


@only_native
def test_native_may_stop_half_way(rig: Rig, block: RamBlock) -> None:
    for first, count in ((0, 1), (1, 1), (2, 2)):
        rig.target.map(BASE + first * PAGE_SIZE, host(block, first, count))
    with pytest.raises(DmaError, match="may be gone") as caught:
        rig.target.unmap(BASE, 3 * PAGE_SIZE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.ENOENT, True)
    assert rig.reached(4) == {2, 3}


@only_cutting
def test_a_cut_of_any_part(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host(block, 0, 16))
    left = set(range(16))
    # Front, back, middle, over a hole, everything that is left.
    for first, count in ((0, 1), (15, 1), (7, 2), (6, 4), (0, 16)):
        removed = rig.target.unmap(BASE + first * PAGE_SIZE, count * PAGE_SIZE)
        gone = left & set(range(first, first + count))
        left -= gone
        assert removed == len(gone) * PAGE_SIZE
        assert rig.reached(16) == left
    assert rig.target.unmap(BASE, PAGE_SIZE) == 0


@only_cutting
def test_a_cut_of_a_large_mapping(rig: Rig) -> None:
    with RamBlock.create("ram", 64 * MIB) as large:
        rig.target.map(BASE, host_range(large.fd, large.address, 0, 64 * MIB // PAGE_SIZE))
        middle = BASE + 33 * MIB
        assert rig.target.unmap(middle, PAGE_SIZE) == PAGE_SIZE
        assert [rig.reaches(middle + step * PAGE_SIZE) for step in (-1, 0, 1)] == [
            True,
            False,
            True,
        ]
        assert large.read(33 * MIB, 4) == bytes(4)
        rig.target.map(middle, host_range(large.fd, large.address, 33 * MIB // PAGE_SIZE))
        assert rig.reaches(middle)


@only_iommufd
def test_what_is_mapped_without_a_device_is_there_when_it_comes(rig: Rig, block: RamBlock) -> None:
    device = rig.testdev.device
    device.detach()
    assert not rig.reaches(BASE)
    rig.target.map(BASE, host(block, 0, 4))
    if rig.way is Way.CUTTING:
        rig.target.unmap(BASE + PAGE_SIZE, PAGE_SIZE)
    device.attach()
    assert rig.reached(5) == ({0, 2, 3} if rig.way is Way.CUTTING else {0, 1, 2, 3})


@only_iommufd
def test_a_device_does_not_attach_where_it_cannot_reach(rig: Rig, block: RamBlock) -> None:
    device = rig.testdev.device
    device.detach()
    # Nobody's addresses as long as no device is there.
    assert rig.target.capabilities.iova_ranges == ((0, 1 << 64),)
    rig.target.map(0xFEE0_0000, host(block))
    with pytest.raises(DmaError, match="addresses that the device cannot use") as caught:
        device.attach()
    assert caught.value.errno == errno.EADDRINUSE
    rig.target.unmap(0xFEE0_0000, PAGE_SIZE)
    device.attach()
    assert rig.target.capabilities.iova_ranges != ((0, 1 << 64),)


@only_native
def test_native_maps_a_memfd_by_its_file(rig: Rig) -> None:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    # Nothing of it is mapped into this process: only the file can be meant.
    rig.target.map(BASE, HostRange(fd, PAGE_SIZE, 0, 2 * PAGE_SIZE))
    assert rig.reached(3) == {0, 1}
    assert os.pread(fd, 4, PAGE_SIZE) == rig.testdev.pattern(4)
    assert os.pread(fd, 4, 0) == bytes(4)
    os.close(fd)
    rig.target.unmap(BASE, 2 * PAGE_SIZE)


@only_native
def test_what_is_no_memfd_is_mapped_by_its_address(rig: Rig, block: RamBlock) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    rig.target.map(BASE, HostRange(fd, 0, block.address, PAGE_SIZE))
    os.close(fd)
    assert rig.reaches(BASE)
    assert block.read(0, 4) == rig.testdev.pattern(4)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    reserved = Path("/proc/sys/vm/nr_hugepages")
    before = reserved.read_text()
    reserved.write_text("8\n")
    yield
    reserved.write_text(before)


@every_way
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_of_the_host(rig: Rig) -> None:
    backend = HostMemoryBackend(size=4 * MIB, kind=BackendKind.HUGETLB, page_size=2 * MIB)
    with RamBlock.from_backend("ram", backend) as huge:
        rig.target.map(BASE, host_range(huge.fd, huge.address, 0, 4 * MIB // PAGE_SIZE))
        assert rig.reaches(BASE + MIB)
        assert huge.read(MIB, 4) == rig.testdev.pattern(4)
        if rig.way is Way.CUTTING:
            # The IOMMU's entries are small, whatever the memory is made of.
            rig.target.unmap(BASE + MIB, PAGE_SIZE)
            assert [rig.reaches(BASE + MIB + step * PAGE_SIZE) for step in (-1, 0, 1)] == [
                True,
                False,
                True,
            ]
        assert rig.target.unmap(BASE, 4 * MIB) == 4 * MIB - PAGE_SIZE * (rig.way is Way.CUTTING)


def test_a_descriptor_that_leads_elsewhere(block: RamBlock) -> None:
    with open_rig(Way.NATIVE) as rig:
        rig.target.map(BASE, host(block))
        assert isinstance(rig.target, IommufdIoas)
        kept = os.dup(rig.target.fileno())
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, rig.target.fileno())
        with pytest.raises(KernelRefusal) as caught:
            rig.target.unmap(BASE, PAGE_SIZE)
        assert (caught.value.errno, caught.value.in_doubt) == (errno.ENOTTY, False)
        assert rig.reaches(BASE)
        os.dup2(kept, rig.target.fileno())
        os.close(kept)
        os.close(null)
