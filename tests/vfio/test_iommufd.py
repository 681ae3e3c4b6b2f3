import errno
import os
from collections.abc import Callable, Iterator

import pytest

from descriptors import open_descriptors
from fake_vfio import FakeKernel
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock
from ramblock.dma import DmaCapabilities, HostRange, IommufdIoas, IommufdMode
from ramblock.errors import ConversionError, DmaError, PoisonedError
from ramblock.testing.conformance import check_target
from ramblock.uapi import ioctl

PAGE = 4096
PAGES = 16
DEV = "/dev/null"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(ioctl, "call", kernel.call)
    return kernel


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", PAGES * PAGE) as block:
        yield block


@pytest.fixture
def native(kernel: FakeKernel) -> IommufdIoas:
    return IommufdIoas(cutting=False, path=DEV)


@pytest.fixture
def cutting(kernel: FakeKernel) -> IommufdIoas:
    return IommufdIoas(cutting=True, path=DEV)


def host(block: RamBlock, first: int = 0, count: int = 1) -> HostRange:
    return HostRange(block.fd, first * PAGE, block.address + first * PAGE, count * PAGE)


def mapped(kernel: FakeKernel, target: IommufdIoas) -> dict[int, tuple[int, str, bool]]:
    return kernel.areas[target.ioas_id].by_iova


# -- the mode --------------------------------------------------------------------------------------


def test_it_cuts_where_the_kernel_does(kernel: FakeKernel) -> None:
    target = IommufdIoas(path=DEV)
    assert target.mode is IommufdMode.CUTTING
    assert target.why_native is None
    assert (target.capabilities.cut, target.capabilities.exact) == (True, False)
    assert "cutting" in repr(target)
    # The scratch address space of the probe is gone.
    assert list(kernel.areas) == [target.ioas_id]


@pytest.mark.parametrize("call", ["IOMMU_OPTION", "IOMMU_VFIO_IOAS", "VFIO_IOMMU_UNMAP_DMA"])
def test_it_is_native_where_a_part_of_that_is_missing(kernel: FakeKernel, call: str) -> None:
    kernel.refuse[call] = errno.EOPNOTSUPP
    target = IommufdIoas(path=DEV)
    assert target.mode is IommufdMode.NATIVE
    assert target.why_native is not None
    assert call in target.why_native
    assert (target.capabilities.cut, target.capabilities.exact) == (False, True)
    assert "native" in repr(target)
    assert list(kernel.areas) == [target.ioas_id]


def test_a_kernel_that_says_it_has_cut_and_has_not(kernel: FakeKernel) -> None:
    kernel.answers["VFIO_IOMMU_UNMAP_DMA"] = (
        0  # removes nothing, and `size` stays what was asked for
    )
    target = IommufdIoas(path=DEV)
    assert target.mode is IommufdMode.NATIVE
    assert target.why_native == "0x3000 bytes were left of a mapping after a cut"


def test_cutting_or_nothing(kernel: FakeKernel) -> None:
    kernel.cuts = False
    before = open_descriptors()
    with pytest.raises(DmaError, match="does not cut: VFIO_IOMMU_UNMAP_DMA") as caught:
        IommufdIoas(cutting=True, path=DEV)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert open_descriptors() == before


def test_native_on_request_tries_nothing(kernel: FakeKernel, native: IommufdIoas) -> None:
    assert native.mode is IommufdMode.NATIVE
    assert native.why_native is None
    # The ranges of this kernel need a second call.
    assert kernel.calls == ["IOMMU_IOAS_ALLOC", *["IOMMU_IOAS_IOVA_RANGES"] * 2]


def test_ranges_are_half_open_and_complete(native: IommufdIoas) -> None:
    ranges = native.capabilities.iova_ranges
    assert ranges is not None
    assert len(ranges) == 40
    assert ranges[:2] == ((0, 0xFEE0_0000), (0xFEF0_0000, 1 << 48))
    assert native.capabilities.page_size == PAGE
    assert native.capabilities.max_mappings is None


# -- mapping ---------------------------------------------------------------------------------------


def test_a_memfd_is_mapped_as_a_file(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock
) -> None:
    native.map(0, host(block), writable=False)
    assert mapped(kernel, native) == {0: (PAGE, "file", False)}


def test_anonymous_memory_is_mapped_by_its_address(kernel: FakeKernel, native: IommufdIoas) -> None:
    native.map(0, HostRange(None, 0, 0x7000_0000, PAGE))
    assert mapped(kernel, native) == {0: (PAGE, "user", True)}


def test_a_file_that_is_no_memfd_is_mapped_by_its_address(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock
) -> None:
    fd = os.open(DEV, os.O_RDONLY)
    native.map(0, HostRange(fd, 0, 0x7000_0000, PAGE))
    os.close(fd)
    assert mapped(kernel, native) == {0: (PAGE, "user", True)}
    # That says nothing about the next one.
    native.map(PAGE, host(block))
    assert mapped(kernel, native)[PAGE] == (PAGE, "file", True)


def test_a_kernel_without_map_file_is_asked_once(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock
) -> None:
    kernel.refuse["IOMMU_IOAS_MAP_FILE"] = errno.ENOTTY
    native.map(0, host(block))
    native.map(PAGE, host(block))
    assert kernel.calls.count("IOMMU_IOAS_MAP_FILE") == 1
    assert mapped(kernel, native) == {0: (PAGE, "user", True), PAGE: (PAGE, "user", True)}


def test_cutting_maps_by_address(kernel: FakeKernel, cutting: IommufdIoas, block: RamBlock) -> None:
    cutting.map(0, host(block))
    assert mapped(kernel, cutting) == {0: (PAGE, "user", True)}


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOMEM, errno.EFAULT])
def test_a_refused_file_is_not_tried_in_another_way(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock, number: int
) -> None:
    kernel.refuse["IOMMU_IOAS_MAP_FILE"] = number
    with pytest.raises(DmaError) as caught:
        native.map(PAGE, host(block))
    assert (caught.value.errno, caught.value.iova, caught.value.size) == (number, PAGE, PAGE)
    assert kernel.calls[-1] == "IOMMU_IOAS_MAP_FILE"


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (1, PAGE),
        (0, 0),
        (0, PAGE + 1),
        (-PAGE, PAGE),
        (1 << 64, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
    ],
)
def test_bad_addresses_do_not_get_to_the_kernel(
    kernel: FakeKernel, native: IommufdIoas, iova: int, size: int
) -> None:
    kernel.calls.clear()
    for call in (
        lambda: native.map(iova, HostRange(None, 0, 0, size)),
        lambda: native.unmap(iova, size),
    ):
        with pytest.raises(DmaError, match="not made of whole pages") as caught:
            call()
        assert (caught.value.errno, caught.value.in_doubt) == (errno.EINVAL, False)
    assert kernel.calls == []


@pytest.mark.parametrize("cuts", [False, True])
def test_it_is_a_target_like_any_other(kernel: FakeKernel, cuts: bool) -> None:
    check_target(
        lambda: IommufdIoas(cutting=cuts, path=DEV),
        reaches=lambda target, iova: kernel.reaches(target.ioas_id, iova),
    )
    assert all(areas.by_iova == {} for areas in kernel.areas.values())


# -- what is left of an unmap that failed ----------------------------------------------------------


def test_one_page_is_removed_or_not(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock
) -> None:
    native.map(0, host(block, 0, 2))
    with pytest.raises(DmaError) as sticks_out:
        native.unmap(0, PAGE)
    with pytest.raises(DmaError) as nothing:
        native.unmap(4 * PAGE, PAGE)
    kernel.areas[native.ioas_id].locked.add(2 * PAGE)
    native.map(2 * PAGE, host(block))
    with pytest.raises(DmaError) as locked:
        native.unmap(2 * PAGE, PAGE)
    for caught, number in (
        (sticks_out, errno.ENOENT),
        (nothing, errno.ENOENT),
        (locked, errno.EBUSY),
    ):
        assert (caught.value.errno, caught.value.in_doubt) == (number, False)


def test_one_large_page_is_removed_or_not(kernel: FakeKernel, block: RamBlock) -> None:
    kernel.iova_alignment = 4 * PAGE
    target = IommufdIoas(cutting=False, path=DEV)
    target.map(0, host(block, 0, 4))
    kernel.areas[target.ioas_id].locked.add(0)
    with pytest.raises(DmaError) as one:
        target.unmap(0, 4 * PAGE)
    with pytest.raises(DmaError) as two:
        target.unmap(0, 8 * PAGE)
    assert [error.value.in_doubt for error in (one, two)] == [False, True]


def test_several_pages_may_be_half_gone(
    kernel: FakeKernel, native: IommufdIoas, block: RamBlock
) -> None:
    native.map(0, host(block))
    native.map(PAGE, host(block, 1, 2))
    with pytest.raises(DmaError, match="may be gone") as caught:
        native.unmap(0, 2 * PAGE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.ENOENT, True)
    assert list(mapped(kernel, native)) == [PAGE]


@pytest.mark.parametrize(
    ("number", "in_doubt"),
    [
        (errno.EINVAL, False),
        (errno.EOVERFLOW, False),
        (errno.ENOTTY, False),
        (errno.EBADF, False),
        (errno.EBUSY, True),
        (errno.EDEADLK, True),
        (errno.EFAULT, True),
        (errno.EIO, True),  # not known to come from there: nothing is known about it
    ],
)
def test_which_refusals_are_in_doubt(
    kernel: FakeKernel, native: IommufdIoas, number: int, in_doubt: bool
) -> None:
    kernel.refuse["IOMMU_IOAS_UNMAP"] = number
    with pytest.raises(DmaError) as caught:
        native.unmap(0, 2 * PAGE)
    assert (caught.value.errno, caught.value.in_doubt) == (number, in_doubt)


def test_an_answer_that_cannot_be_written_is_in_doubt_even_for_one_page(
    kernel: FakeKernel, native: IommufdIoas, cutting: IommufdIoas, block: RamBlock
) -> None:
    for target in (native, cutting):
        target.map(0, host(block))
        kernel.write_back_fails = True
        with pytest.raises(DmaError) as caught:
            target.unmap(0, PAGE)
        kernel.write_back_fails = False
        assert caught.value.in_doubt
        assert mapped(kernel, target) == {}


def test_a_cut_that_is_refused_has_done_nothing(
    kernel: FakeKernel, cutting: IommufdIoas, block: RamBlock
) -> None:
    cutting.map(0, host(block, 0, 4))
    kernel.cuts = False
    with pytest.raises(DmaError) as caught:
        cutting.unmap(PAGE, PAGE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.EINVAL, False)
    assert mapped(kernel, cutting) == {0: (4 * PAGE, "user", True)}


@pytest.mark.parametrize(("locked", "in_doubt"), [(0, False), (2, True)])
def test_the_answer_of_a_cut_tells_how_far_it_came(
    kernel: FakeKernel, cutting: IommufdIoas, block: RamBlock, locked: int, in_doubt: bool
) -> None:
    for at in (0, 2):
        cutting.map(at * PAGE, host(block, at, 2))
    kernel.areas[cutting.ioas_id].locked.add(locked * PAGE)
    with pytest.raises(DmaError) as caught:
        cutting.unmap(0, 4 * PAGE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.EBUSY, in_doubt)
    assert ("0x2000 bytes of it are gone" in str(caught.value)) == in_doubt


class AsIfInexact:
    """A native address space for a caller that unmaps several mappings at once."""

    def __init__(self, inner: IommufdIoas) -> None:
        self.inner = inner
        self.capabilities = DmaCapabilities()
        self.map = inner.map
        self.unmap = inner.unmap
        self.close = inner.close


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    with RamBlock.create("ram", PAGES * PAGE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        yield memory


def share_and_replace_the_last_page(
    kernel: FakeKernel, target: IommufdIoas, memory: GuestMemory
) -> None:
    """
    Behind the mapper's back: pages 0 to 2 are mapped as it thinks, but what is at page 3 goes on to
    page 4.
    """
    memory.convert(0, 4 * PAGE, PageState.SHARED)
    areas = mapped(kernel, target)
    areas[3 * PAGE] = (2 * PAGE, "somebody", True)


def test_half_an_unmap_poisons(kernel: FakeKernel, native: IommufdIoas, guest: GuestMemory) -> None:
    target = AsIfInexact(native)
    guest.attach(target)
    share_and_replace_the_last_page(kernel, native, guest)
    with pytest.raises(PoisonedError):
        guest.convert(0, 4 * PAGE, PageState.PRIVATE)
    assert guest.poisoned
    [doubt] = guest.in_doubt()
    assert doubt.gpa <= 3 * PAGE < doubt.gpa + doubt.size
    assert guest.state(0) is PageState.SHARED


def test_exact_puts_the_same_back(
    kernel: FakeKernel, native: IommufdIoas, guest: GuestMemory
) -> None:
    mapper = guest.attach(native)
    assert mapper.policy is MappingPolicy.PAGE
    share_and_replace_the_last_page(kernel, native, guest)
    with pytest.raises(ConversionError) as caught:
        guest.convert(0, 4 * PAGE, PageState.PRIVATE)
    assert caught.value.rolled_back
    assert not guest.poisoned
    assert sorted(mapped(kernel, native)) == [0, PAGE, 2 * PAGE, 3 * PAGE]
    # So it is with a mapping that the kernel holds on to.
    del mapped(kernel, native)[3 * PAGE]
    native.map(3 * PAGE, HostRange(None, 0, 0x7000_0000, PAGE))
    kernel.areas[native.ioas_id].locked.add(2 * PAGE)
    with pytest.raises(ConversionError) as caught:
        guest.convert(0, 4 * PAGE, PageState.PRIVATE)
    assert caught.value.rolled_back
    kernel.areas[native.ioas_id].locked.clear()
    guest.convert(0, 4 * PAGE, PageState.PRIVATE)
    assert mapped(kernel, native) == {}


# -- lifetimes -------------------------------------------------------------------------------------


def test_whatever_call_fails_nothing_is_held(kernel: FakeKernel) -> None:
    before = open_descriptors()
    IommufdIoas(cutting=True, path=DEV).close()
    for number in range(1, len(kernel.calls)):
        kernel.calls.clear()
        kernel.fail_at = number
        with pytest.raises(DmaError):
            IommufdIoas(cutting=True, path=DEV)
        assert open_descriptors() == before


def test_closing_unmaps_and_may_be_repeated(kernel: FakeKernel, block: RamBlock) -> None:
    before = open_descriptors()
    target = IommufdIoas(path=DEV)
    target.map(0, host(block))
    target.close()
    assert mapped(kernel, target) == {}
    target.close()
    assert open_descriptors() == before
    assert "closed" in repr(target)
    calls: tuple[Callable[[], object], ...] = (
        lambda: target.map(0, host(block)),
        lambda: target.unmap(0, PAGE),
        target.fileno,
        target.refresh,
    )
    for call in calls:
        with pytest.raises(DmaError, match="it was closed") as caught:
            call()
        assert (caught.value.errno, caught.value.in_doubt) == (errno.EBADF, False)


def test_closing_closes_also_if_the_kernel_does_not_unmap(kernel: FakeKernel) -> None:
    before = open_descriptors()
    target = IommufdIoas(path=DEV)
    kernel.refuse["IOMMU_IOAS_UNMAP"] = errno.EBUSY
    with pytest.raises(DmaError):
        target.close()
    assert open_descriptors() == before


def test_no_iommufd_on_this_machine() -> None:
    with pytest.raises(DmaError, match="CONFIG_IOMMUFD") as caught:
        IommufdIoas(path="/nonexistent/iommu")
    assert caught.value.errno == errno.ENOENT
