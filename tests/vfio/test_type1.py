import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from descriptors import open_descriptors
from fake_vfio import FakeKernel
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock
from ramblock.dma import HostRange, Type1Container, VfioGroup
from ramblock.errors import DmaError, MappingLimitError, UsageError
from ramblock.testing.conformance import check_target
from ramblock.uapi import ioctl

PAGE = 4096
PAGES = 16


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
def dev(tmp_path: Path) -> Path:
    """Stands in for /dev/vfio."""
    for name in ("vfio", "7", "8"):
        (tmp_path / name).symlink_to("/dev/null")
    return tmp_path


def with_group(dev: Path) -> Type1Container:
    container = Type1Container(path=str(dev / "vfio"))
    container.add_group(VfioGroup(7, folder=dev))
    return container


def host(block: RamBlock, first: int = 0, count: int = 1) -> HostRange:
    return HostRange(block.fd, first * PAGE, block.address + first * PAGE, count * PAGE)


def test_what_it_says_it_can(kernel: FakeKernel, dev: Path) -> None:
    target = with_group(dev)
    capabilities = target.capabilities
    assert (capabilities.page_size, capabilities.cut, capabilities.exact) == (4096, False, False)
    assert capabilities.iova_ranges == ((0, 0xFEE0_0000), (0xFEF0_0000, 1 << 48))
    assert "groups [7]" in repr(target)


def test_no_capabilities_before_the_first_group(kernel: FakeKernel, dev: Path) -> None:
    with pytest.raises(UsageError, match="no IOMMU before a group"):
        _ = Type1Container(path=str(dev / "vfio")).capabilities


def test_the_limit_is_that_of_the_empty_container(
    kernel: FakeKernel, dev: Path, block: RamBlock
) -> None:
    kernel.limit = 10
    target = with_group(dev)
    target.map(0, host(block))
    assert (target.available, target.capabilities.max_mappings) == (9, 10)
    # A second group narrows addresses, and has nothing to say about the limit.
    target.add_group(VfioGroup(8, folder=dev))
    assert target.capabilities.max_mappings == 10
    target.unmap(0, PAGE)
    assert target.available == 10


def test_a_conversion_beyond_the_limit_never_gets_to_the_kernel(
    kernel: FakeKernel, dev: Path
) -> None:
    kernel.limit = 3
    target = with_group(dev)
    with RamBlock.create("ram", PAGES * PAGE, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        mapper = memory.attach(target)
        assert mapper.policy is MappingPolicy.PAGE
        memory.convert(0, 3 * PAGE, PageState.SHARED)
        kernel.calls.clear()
        with pytest.raises(MappingLimitError) as caught:
            memory.convert(3 * PAGE, PAGE, PageState.SHARED)
        assert (caught.value.limit, caught.value.needed) == (3, 4)
        assert kernel.calls == []


def test_it_is_a_target_like_any_other(kernel: FakeKernel, dev: Path) -> None:
    check_target(lambda: with_group(dev), reaches=lambda _, iova: kernel.reaches(0, iova))
    assert kernel.areas[0].by_iova == {}


def test_its_limit_is_that_of_the_kernel(kernel: FakeKernel, dev: Path) -> None:
    kernel.limit = 5
    check_target(lambda: with_group(dev), reaches=lambda _, iova: kernel.reaches(0, iova))


def test_a_refused_map_says_what_helps(kernel: FakeKernel, dev: Path, block: RamBlock) -> None:
    target = with_group(dev)
    with pytest.raises(DmaError) as caught:
        target.map(0xFEE0_0000, host(block))
    assert caught.value.errno == errno.EINVAL
    assert "VFIO_IOMMU_MAP_DMA [0xfee00000, 0xfee01000)" in str(caught.value)
    assert "usable: [0x0, 0xfee00000), [0xfef00000, 0x1000000000000)" in str(caught.value)


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
    kernel: FakeKernel, dev: Path, iova: int, size: int
) -> None:
    # A field of 64 bits takes 2**64 for 0.
    target = with_group(dev)
    kernel.calls.clear()
    calls: tuple[Callable[[], object], ...] = (
        lambda: target.map(iova, HostRange(None, 0, 0, size)),
        lambda: target.unmap(iova, size),
    )
    for call in calls:
        with pytest.raises(DmaError, match="not made of whole pages") as caught:
            call()
        assert (caught.value.errno, caught.value.in_doubt) == (errno.EINVAL, False)
    assert kernel.calls == []


def test_an_unmap_that_would_cut_is_undone(kernel: FakeKernel, dev: Path, block: RamBlock) -> None:
    target = with_group(dev)
    target.map(0, host(block, 0, 4))
    with pytest.raises(DmaError) as caught:
        target.unmap(PAGE, PAGE)
    assert (caught.value.errno, caught.value.in_doubt) == (errno.EINVAL, False)
    assert target.unmap(0, 8 * PAGE) == 4 * PAGE


def test_what_was_removed_is_not_known_if_the_answer_is_lost(kernel: FakeKernel, dev: Path) -> None:
    target = with_group(dev)
    kernel.refuse["VFIO_IOMMU_UNMAP_DMA"] = errno.EFAULT
    with pytest.raises(DmaError) as caught:
        target.unmap(0, PAGE)
    assert caught.value.in_doubt


# -- groups, lifetimes -----------------------------------------------------------------------------


def test_a_group_that_is_not_viable_stays_out(kernel: FakeKernel, dev: Path) -> None:
    kernel.viable = False
    target, other = Type1Container(path=str(dev / "vfio")), VfioGroup(7, folder=dev)
    with pytest.raises(DmaError, match="group 7 has") as caught:
        target.add_group(other)
    assert caught.value.errno == errno.EBUSY
    assert "VFIO_GROUP_SET_CONTAINER" not in kernel.calls
    assert target.group(7) is None


def test_the_same_group_twice(kernel: FakeKernel, dev: Path) -> None:
    target = with_group(dev)
    first = target.group(7)
    assert first is not None
    with pytest.raises(UsageError, match="in the container already"):
        target.add_group(first)
    assert target.group(7) is first


def test_whatever_call_fails_nothing_is_held(kernel: FakeKernel, dev: Path) -> None:
    before = open_descriptors()
    with_group(dev).close()
    kernel.groups_in_container.clear()
    # All but the unmap of closing.
    for number in range(1, len(kernel.calls)):
        kernel.calls.clear()
        kernel.fail_at = number
        with pytest.raises(DmaError) as caught:
            open_and_add(dev)
        assert caught.value.errno == errno.EIO
        assert kernel.groups_in_container == set()
        assert open_descriptors() == before


def open_and_add(dev: Path) -> None:
    target, group = Type1Container(path=str(dev / "vfio")), VfioGroup(7, folder=dev)
    try:
        target.add_group(group)
    finally:
        assert target.group(7) is None
        group.close()
        target.close()


def test_closing_unmaps_and_may_be_repeated(kernel: FakeKernel, dev: Path, block: RamBlock) -> None:
    before = open_descriptors()
    target = with_group(dev)
    target.map(0, host(block))
    target.close()
    assert kernel.areas[0].by_iova == {}
    target.close()
    assert open_descriptors() == before
    assert "closed" in repr(target)
    calls: tuple[Callable[[], object], ...] = (
        lambda: target.map(0, host(block)),
        lambda: target.unmap(0, PAGE),
        lambda: target.available,
    )
    for call in calls:
        with pytest.raises(DmaError, match="it was closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF
        assert not caught.value.in_doubt


def test_closing_lets_go_of_the_groups_also_if_the_kernel_does_not_unmap(
    kernel: FakeKernel, dev: Path
) -> None:
    before = open_descriptors()
    target = with_group(dev)
    kernel.refuse["VFIO_IOMMU_UNMAP_DMA"] = errno.EBUSY
    with pytest.raises(DmaError):
        target.close()
    assert open_descriptors() == before
    target.close()


def test_a_container_without_groups_has_nothing_to_unmap(kernel: FakeKernel, dev: Path) -> None:
    Type1Container(path=str(dev / "vfio")).close()
    assert "VFIO_IOMMU_UNMAP_DMA" not in kernel.calls


def test_a_container_that_is_forgotten_is_closed(kernel: FakeKernel, dev: Path) -> None:
    before = open_descriptors()
    target = with_group(dev)
    assert open_descriptors() != before
    del target
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("call", "answer", "text"),
    [
        ("VFIO_GET_API_VERSION", 1, "speaks version 1, not 0"),
        ("VFIO_CHECK_EXTENSION", 0, "does not know VFIO_TYPE1v2_IOMMU"),
    ],
)
def test_another_kind_of_container(
    kernel: FakeKernel, dev: Path, call: str, answer: int, text: str
) -> None:
    kernel.answers[call] = answer
    before = open_descriptors()
    with pytest.raises(DmaError, match=text):
        Type1Container(path=str(dev / "vfio"))
    assert open_descriptors() == before


def test_a_device_file_that_is_not_there() -> None:
    with pytest.raises(DmaError, match="CONFIG_VFIO_CONTAINER") as caught:
        Type1Container(path="/nonexistent/vfio")
    assert caught.value.errno == errno.ENOENT
    assert "/nonexistent/vfio" in str(caught.value)
