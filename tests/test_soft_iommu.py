import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE
from ramblock import BackendKind, GuestMemory, HostMemoryBackend, MappingPolicy, PageState, RamBlock
from ramblock.dma import DmaTarget, FaultRecord, HostRange, SoftIommu, soft
from ramblock.errors import DmaError, IommuFault, UsageError
from ramblock.units import MIB
from require import require_hugetlb

COUNT = 16
BASE = 0x10_0000


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", COUNT * PAGE) as block:
        yield block


def host(block: RamBlock, first: int = 0, count: int = 1, *, page: int = PAGE) -> HostRange:
    return HostRange(block.fd, first * page, block.address + first * page, count * page)


def table(iommu: SoftIommu) -> list[tuple[int, int]]:
    return [(entry.iova, entry.size) for entry in iommu.mappings()]


@contextmanager
def refused(number: int) -> Iterator[pytest.ExceptionInfo[DmaError]]:
    with pytest.raises(DmaError) as caught:
        yield caught
    assert caught.value.errno == number


# -- its word --------------------------------------------------------------------------------------


def test_what_it_says_it_can() -> None:
    plain: DmaTarget = SoftIommu()
    assert plain.capabilities.cut
    assert not plain.capabilities.exact
    assert plain.capabilities.page_size == 4096
    assert plain.capabilities.max_mappings is None
    assert plain.capabilities.iova_ranges is None
    odd = SoftIommu(
        cut=False, max_mappings=7, page_size=65536, exact=True, iova_ranges=((0, 1 << 48),)
    ).capabilities
    assert (odd.cut, odd.exact, odd.max_mappings, odd.page_size) == (False, True, 7, 65536)
    assert odd.iova_ranges == ((0, 1 << 48),)
    # What must be named whole cannot be cut.
    assert not SoftIommu(cut=True, exact=True).capabilities.cut


@pytest.mark.parametrize("page_size", [0, -1, 3, 4097, None, True])
def test_a_page_size_that_is_no_power_of_two(page_size: int) -> None:
    with pytest.raises(UsageError):
        SoftIommu(page_size=page_size)


@pytest.mark.parametrize("limit", [0, -1, True, "7", 1.5])
def test_a_limit_that_is_none(limit: int) -> None:
    with pytest.raises(UsageError):
        SoftIommu(max_mappings=limit)


# -- mapping ---------------------------------------------------------------------------------------


def test_mappings_are_listed_ascending(block: RamBlock) -> None:
    iommu = SoftIommu()
    for at in (5, 1, 3):
        iommu.map(at * PAGE, host(block, at), writable=at != 3)
    assert table(iommu) == [(PAGE, PAGE), (3 * PAGE, PAGE), (5 * PAGE, PAGE)]
    assert [entry.writable for entry in iommu.mappings()] == [True, False, True]
    assert iommu.mappings()[0].memory == host(block, 1)
    assert "3 mappings" in repr(iommu)


@pytest.mark.parametrize(
    ("iova", "count"), [(4, 2), (3, 2), (5, 2), (4, 1), (5, 1), (0, 16), (3, 4)]
)
def test_what_overlaps_is_refused_and_named(block: RamBlock, iova: int, count: int) -> None:
    iommu = SoftIommu()
    iommu.map(4 * PAGE, host(block, 0, 2))
    with refused(errno.EEXIST) as caught:
        iommu.map(iova * PAGE, host(block, 0, count))
    assert "[0x4000, 0x6000) is mapped" in str(caught.value)
    assert (caught.value.iova, caught.value.size) == (iova * PAGE, count * PAGE)
    assert table(iommu) == [(4 * PAGE, 2 * PAGE)]


def test_what_touches_does_not_overlap(block: RamBlock) -> None:
    iommu = SoftIommu()
    for at in (4, 3, 5):
        iommu.map(at * PAGE, host(block))
    assert len(table(iommu)) == 3


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (1, PAGE),
        (PAGE, 1),
        (PAGE, PAGE + 1),
        (0, 0),
        (-PAGE, PAGE),
        (0, -PAGE),
        (1 << 64, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
    ],
)
def test_bad_addresses_are_einval(block: RamBlock, iova: int, size: int) -> None:
    iommu = SoftIommu()
    with refused(errno.EINVAL):
        iommu.map(iova, HostRange(block.fd, 0, block.address, size))
    with refused(errno.EINVAL):
        iommu.unmap(iova, size)
    assert table(iommu) == []


def test_the_last_page_there_is(block: RamBlock) -> None:
    iommu = SoftIommu()
    last = (1 << 64) - PAGE
    iommu.map(last, host(block))
    iommu.write(last, b"x" * PAGE)
    assert iommu.read((1 << 64) - 1, 1) == b"x"
    assert iommu.unmap(last, PAGE) == PAGE


def test_iova_ranges(block: RamBlock) -> None:
    iommu = SoftIommu(iova_ranges=((0, 2 * PAGE), (4 * PAGE, 8 * PAGE)))
    iommu.map(0, host(block, 0, 2))
    iommu.map(6 * PAGE, host(block, 0, 2))
    for iova, count in ((2, 1), (3, 2), (7, 2), (8, 1), (1, 5)):
        with refused(errno.EINVAL):
            iommu.map(iova * PAGE, host(block, 0, count))
    assert table(iommu) == [(0, 2 * PAGE), (6 * PAGE, 2 * PAGE)]


@pytest.mark.parametrize("page_size", [512, 65536])
def test_pages_of_another_size(page_size: int) -> None:
    with RamBlock.create("ram", 4 * 65536) as block:
        iommu = SoftIommu(page_size=page_size)
        iommu.map(page_size, host(block, 0, 2, page=page_size))
        assert iommu.unmap(2 * page_size, page_size) == page_size
        for iova, size in ((page_size // 2, page_size), (page_size, page_size // 2)):
            with refused(errno.EINVAL) as caught:
                iommu.unmap(iova, size)
            assert f"pages of {page_size:#x} bytes" in str(caught.value)
        assert table(iommu) == [(page_size, page_size)]


def test_a_limit(block: RamBlock) -> None:
    iommu = SoftIommu(max_mappings=2)
    iommu.map(0, host(block, 0, 4))
    iommu.map(8 * PAGE, host(block))
    with refused(errno.ENOSPC) as caught:
        iommu.map(9 * PAGE, host(block))
    assert "2 of 2 mappings in use" in str(caught.value)
    # A cut in the middle needs an entry too; one at an end, or of everything, does not.
    with refused(errno.ENOSPC):
        iommu.unmap(PAGE, PAGE)
    assert table(iommu) == [(0, 4 * PAGE), (8 * PAGE, PAGE)]
    assert iommu.unmap(3 * PAGE, PAGE) == PAGE
    assert iommu.unmap(0, PAGE) == PAGE
    assert table(iommu) == [(PAGE, 2 * PAGE), (8 * PAGE, PAGE)]
    assert iommu.unmap(8 * PAGE, PAGE) == PAGE
    iommu.map(0, host(block))


# -- unmapping -------------------------------------------------------------------------------------


def test_a_cut_leaves_the_rest_where_it_was(block: RamBlock) -> None:
    iommu = SoftIommu()
    block.write(0, b"".join(bytes([at]) * PAGE for at in range(8)))
    iommu.map(BASE, host(block, 0, 8), writable=False)
    assert iommu.unmap(BASE + 3 * PAGE, 2 * PAGE) == 2 * PAGE
    assert table(iommu) == [(BASE, 3 * PAGE), (BASE + 5 * PAGE, 3 * PAGE)]
    assert [entry.memory for entry in iommu.mappings()] == [host(block, 0, 3), host(block, 5, 3)]
    assert not any(entry.writable for entry in iommu.mappings())
    assert iommu.read(BASE + 3 * PAGE - 1, 1) == b"\2"
    assert iommu.read(BASE + 5 * PAGE, 1) == b"\5"
    for at in (3, 4):
        with pytest.raises(IommuFault):
            iommu.read(BASE + at * PAGE, 1)


def test_an_unmap_over_several_mappings_and_holes(block: RamBlock) -> None:
    iommu = SoftIommu()
    for first, count in ((0, 4), (5, 2), (9, 4)):
        iommu.map(first * PAGE, host(block, first, count))
    assert iommu.unmap(2 * PAGE, 9 * PAGE) == 6 * PAGE
    assert table(iommu) == [(0, 2 * PAGE), (11 * PAGE, 2 * PAGE)]


@pytest.mark.parametrize("exact", [False, True])
def test_unmapping_where_nothing_is(block: RamBlock, exact: bool) -> None:
    iommu = SoftIommu(exact=exact)
    iommu.map(0, host(block))
    if exact:
        with refused(errno.ENOENT):
            iommu.unmap(4 * PAGE, PAGE)
    else:
        assert iommu.unmap(4 * PAGE, PAGE) == 0
    assert table(iommu) == [(0, PAGE)]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 1), (1, 2), (0, 5), (3, 5), (5, 9)])
def test_without_cut_a_mapping_is_not_bisected(block: RamBlock, first: int, count: int) -> None:
    iommu = SoftIommu(cut=False)
    iommu.map(0, host(block, 0, 4))
    iommu.map(4 * PAGE, host(block, 4, 4))
    with refused(errno.EINVAL) as caught:
        iommu.unmap(first * PAGE, count * PAGE)
    assert "it would cut [" in str(caught.value)
    assert table(iommu) == [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE)]
    assert iommu.unmap(4 * PAGE, 8 * PAGE) == 4 * PAGE
    assert iommu.unmap(0, 4 * PAGE) == 4 * PAGE


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (0, 5), (0, 8), (4, 5), (1, 3)])
def test_exact_means_one_whole_mapping(block: RamBlock, first: int, count: int) -> None:
    iommu = SoftIommu(exact=True)
    iommu.map(0, host(block, 0, 4))
    iommu.map(4 * PAGE, host(block, 4, 4))
    with refused(errno.ENOENT):
        iommu.unmap(first * PAGE, count * PAGE)
    assert len(table(iommu)) == 2
    assert iommu.unmap(4 * PAGE, 4 * PAGE) == 4 * PAGE
    assert table(iommu) == [(0, 4 * PAGE)]


def test_close_unmaps_everything(block: RamBlock) -> None:
    iommu = SoftIommu()
    iommu.map(0, host(block, 0, 4))
    iommu.close()
    iommu.close()
    assert table(iommu) == []
    with pytest.raises(IommuFault):
        iommu.read(0, 1)


# -- accesses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BackendKind.MEMFD, BackendKind.ANONYMOUS])
def test_an_access_over_several_mappings(kind: BackendKind) -> None:
    backend = HostMemoryBackend(size=8 * PAGE, kind=kind)
    with RamBlock.from_backend("ram", backend) as block:
        iommu = SoftIommu()
        # Adjacent for the device, scattered in memory.
        for at, page in enumerate((6, 1, 3)):
            iommu.map(BASE + at * PAGE, host(block, page))
        data = bytes(range(251)) * 40
        data = data[: 2 * PAGE + 100]
        iommu.write(BASE + 50, data)
        assert iommu.read(BASE + 50, len(data)) == data
        assert block.read(6 * PAGE + 50, PAGE - 50) == data[: PAGE - 50]
        assert block.read(PAGE, PAGE) == data[PAGE - 50 : 2 * PAGE - 50]
        assert block.read(3 * PAGE, 150) == data[2 * PAGE - 50 :]
        assert block.read(0, PAGE) == bytes(PAGE)


def test_reading_a_hole_allocates_nothing(block: RamBlock) -> None:
    assert block.fd is not None
    iommu = SoftIommu()
    iommu.map(0, host(block, 0, COUNT))
    assert iommu.read(0, COUNT * PAGE) == bytes(COUNT * PAGE)
    assert os.fstat(block.fd).st_blocks == 0
    iommu.write(0, b"x")
    assert os.fstat(block.fd).st_blocks * 512 == PAGE


@require_hugetlb
def test_writing_to_huge_pages() -> None:
    backend = HostMemoryBackend(size=2 * MIB, kind=BackendKind.HUGETLB, page_size=2 * MIB)
    with RamBlock.from_backend("ram", backend) as block:
        iommu = SoftIommu()
        iommu.map(0, host(block, 0, 2))
        iommu.write(PAGE - 1, b"ab")
        assert iommu.read(PAGE - 2, 4) == b"\0ab\0"


@pytest.mark.parametrize(
    ("first", "size"), [(0, 1), (PAGE - 1, 2), (2 * PAGE, PAGE + 1), (0, 8 * PAGE)]
)
def test_no_byte_is_transferred_by_an_access_that_faults(
    block: RamBlock, first: int, size: int
) -> None:
    iommu = SoftIommu()
    iommu.map(PAGE, host(block, 1, 2))
    with pytest.raises(IommuFault) as caught:
        iommu.write(first, b"x" * size)
    fault = caught.value
    assert (fault.iova, fault.size, fault.write) == (first, size, True)
    assert block.read(0, block.size) == bytes(block.size)
    with pytest.raises(IommuFault) as caught:
        iommu.read(first, size)
    assert caught.value.write is False
    assert list(iommu.faults) == [FaultRecord(first, size, True), FaultRecord(first, size, False)]


def test_the_fault_names_the_first_byte_that_may_not_be_reached(block: RamBlock) -> None:
    iommu = SoftIommu()
    iommu.map(0, host(block, 0, 2))
    iommu.map(3 * PAGE, host(block, 3))
    with pytest.raises(IommuFault, match=r"read from \[0x800, 0x3800\): 0x2000 may not be reached"):
        iommu.read(PAGE // 2, 3 * PAGE)


def test_read_only_mappings(block: RamBlock) -> None:
    iommu = SoftIommu()
    block.write(0, b"rom")
    iommu.map(0, host(block, 0), writable=False)
    iommu.map(PAGE, host(block, 1))
    assert iommu.read(0, 3) == b"rom"
    for iova, data in ((0, b"x"), (PAGE - 1, b"xx")):
        with pytest.raises(IommuFault):
            iommu.write(iova, data)
    assert block.read(PAGE, 1) == b"\0"
    iommu.write(PAGE, b"x")


@pytest.mark.parametrize(
    ("iova", "size"),
    [(0, 0), (0, -1), (-1, 1), (1 << 64, 1), ((1 << 64) - 1, 2), (None, 1), (0, None)],
)
def test_an_access_that_is_none(iova: int, size: int) -> None:
    iommu = SoftIommu()
    with pytest.raises(UsageError):
        iommu.read(iova, size)
    assert iommu.fault_count == 0


def test_an_enormous_access_faults_without_doing_anything_enormous(block: RamBlock) -> None:
    iommu = SoftIommu()
    iommu.map(0, host(block, 0, 4))
    with pytest.raises(IommuFault):
        iommu.read(0, 1 << 63)


def test_fault_records_are_bounded_and_faults_counted() -> None:
    iommu = SoftIommu()
    for at in range(5000):
        with pytest.raises(IommuFault):
            iommu.read(at, 1)
    assert iommu.fault_count == 5000
    assert len(iommu.faults) == 1024
    assert iommu.faults[-1] == FaultRecord(4999, 1, False)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_unmap_returns_when_no_access_is_under_way(
    block: RamBlock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """
    A device's access is stopped between translation and transfer.

    An unmap, and another access, have to wait.
    """
    iommu = SoftIommu()
    iommu.map(0, host(block, 0, 2))
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []
    block.write(0, b"data")
    transfer = getattr(soft, f"_{kind}_host")

    def slow(*arguments: object) -> object:
        inside.set()
        assert go_on.wait(60)
        result = transfer(*arguments)
        order.append("transferred")
        return result

    monkeypatch.setattr(soft, f"_{kind}_host", slow)

    def unmap() -> None:
        iommu.unmap(0, 2 * PAGE)
        order.append("unmapped")

    access = {"read": lambda: iommu.read(0, 4), "write": lambda: iommu.write(0, b"DATA")}[kind]
    device = threading.Thread(target=access)
    device.start()
    assert inside.wait(60)
    host_thread = threading.Thread(target=unmap)
    host_thread.start()
    # Until the device is done the table cannot change: whoever looks sees the mapping or waits.
    assert not iommu._lock.acquire(blocking=False)
    go_on.set()
    device.join(60)
    host_thread.join(60)
    assert order == ["transferred", "unmapped"]
    with pytest.raises(IommuFault):
        iommu.write(0, b"x")
    assert block.read(0, 4) == (b"data" if kind == "read" else b"DATA")


def test_the_same_with_devices_that_never_stop(block: RamBlock) -> None:
    """After an unmap the memory is somebody else's: not one byte of a device may arrive."""
    iommu = SoftIommu()
    stop = threading.Event()
    failures: list[BaseException] = []

    def device() -> None:
        try:
            while not stop.is_set():
                try:
                    iommu.write(0, b"device" * 1000)
                except IommuFault:
                    continue
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=device) for _ in range(3)]
    for thread in threads:
        thread.start()
    clean = bytes(2 * PAGE)
    for _ in range(300):
        iommu.map(0, host(block, 0, 2))
        assert iommu.unmap(0, 2 * PAGE) == 2 * PAGE
        block.write(0, clean)
        assert block.read(0, 2 * PAGE) == clean
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []


# -- against a naive model -------------------------------------------------------------------------


def pages_in(model: list[tuple[int, int]]) -> int:
    return sum(high - low for low, high in model)


steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, COUNT - 1), st.integers(1, COUNT)), max_size=30
)


@given(steps=steps, cut=st.booleans(), exact=st.booleans(), limit=st.none() | st.integers(1, 4))
def test_any_sequence_against_a_list_of_mappings(
    steps: list[tuple[bool, int, int]], cut: bool, exact: bool, limit: int | None
) -> None:
    iommu = SoftIommu(cut=cut, exact=exact, max_mappings=limit)
    model: list[tuple[int, int]] = []  # (first, last + 1) in pages
    with RamBlock.create("ram", COUNT * PAGE) as block:
        for mapping, first, length in steps:
            end = min(first + length, COUNT)
            hit = [(low, high) for low, high in model if low < end and first < high]
            expected: int | None = None
            if mapping:
                after = [*model, (first, end)]
                if hit:
                    expected = errno.EEXIST
                elif limit is not None and len(after) > limit:
                    expected = errno.ENOSPC
            else:
                rest = [(low, first) for low, high in hit if low < first]
                rest += [(end, high) for low, high in hit if high > end]
                after = [entry for entry in model if entry not in hit] + rest
                if exact and hit != [(first, end)]:
                    expected = errno.ENOENT
                elif rest and not cut:
                    expected = errno.EINVAL
                elif limit is not None and len(after) > limit:
                    expected = errno.ENOSPC
            size = (end - first) * PAGE
            if expected is not None:
                with refused(expected):
                    if mapping:
                        iommu.map(first * PAGE, host(block, first, end - first))
                    else:
                        iommu.unmap(first * PAGE, size)
            elif mapping:
                iommu.map(first * PAGE, host(block, first, end - first))
                model = sorted(after)
            else:
                gone = pages_in(model) - pages_in(after)
                assert iommu.unmap(first * PAGE, size) == gone * PAGE
                model = sorted(after)
            assert table(iommu) == [(low * PAGE, (high - low) * PAGE) for low, high in model]
            # The device's view agrees page by page.
            for page in range(COUNT):
                reachable = any(low <= page < high for low, high in model)
                try:
                    assert len(iommu.read(page * PAGE, 1)) == 1
                    assert reachable
                except IommuFault:
                    assert not reachable


def test_driven_by_a_memory_it_reaches_what_is_shared() -> None:
    memory, iommu = GuestMemory(), SoftIommu()
    with RamBlock.create("ram", 8 * PAGE, private="stand-in") as block:
        memory.map(block, BASE)
        memory.attach(iommu, MappingPolicy.RUN)
        memory.convert(BASE + PAGE, 3 * PAGE, PageState.SHARED)
        iommu.write(BASE + PAGE, b"x" * (3 * PAGE))
        memory.convert(BASE + 2 * PAGE, PAGE, PageState.PRIVATE)
        assert iommu.read(BASE + PAGE, PAGE) == iommu.read(BASE + 3 * PAGE, PAGE) == b"x" * PAGE
        with pytest.raises(IommuFault):
            iommu.read(BASE + PAGE, 3 * PAGE)
        memory.convert(BASE + 2 * PAGE, PAGE, PageState.SHARED)
        assert iommu.read(BASE + PAGE, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
