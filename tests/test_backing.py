import gc
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doubles import PAGE
from ramblock import RamBlock
from ramblock.errors import UsageError
from ramblock.hostmem import AnonymousBacking, MemfdBacking, StandInPrivate, backing
from ramblock.hostmem.host_calls import write_own_memory
from ramblock.units import MIB
from require import require_hugetlb


def allocated(fd: int) -> int:
    """What the kernel counts, asked here and not there."""
    return os.fstat(fd).st_blocks * 512


def open_files() -> int:
    gc.collect()  # what earlier tests left lying about is not what is counted
    return len(list(Path("/proc/self/fd").iterdir()))


def resident(address: int) -> int:
    """Bytes that are really there of the mapping around *address*; the zero page does not count."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            return int(rest.split()[0]) * 1024
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.fixture
def memfd() -> Iterator[MemfdBacking]:
    made = MemfdBacking("ram", 16 * PAGE)
    yield made
    made.close()


@pytest.fixture
def anonymous() -> Iterator[AnonymousBacking]:
    made = AnonymousBacking(16 * PAGE)
    yield made
    made.close()


def fd_of(made: MemfdBacking) -> int:
    assert made.fd is not None
    return made.fd


# -- memfd -----------------------------------------------------------------------------------------


def test_a_new_memfd_holds_no_memory(memfd: MemfdBacking) -> None:
    assert allocated(fd_of(memfd)) == memfd.allocated_bytes() == 0
    assert os.fstat(fd_of(memfd)).st_size == memfd.size


def test_descriptor_address_and_calls_are_one_memory(memfd: MemfdBacking) -> None:
    memfd.write(PAGE + 5, b"hello")
    assert os.pread(fd_of(memfd), 5, PAGE + 5) == b"hello"
    write_own_memory(memfd.address + PAGE + 5, b"J")
    assert memfd.read(PAGE + 4, 7) == b"\0Jello\0"
    assert memfd.allocated_bytes() == PAGE


def test_reading_a_hole_allocates_nothing(memfd: MemfdBacking) -> None:
    assert memfd.read(0, memfd.size) == bytes(memfd.size)
    assert allocated(fd_of(memfd)) == 0


def test_discard_frees_in_the_file_and_in_every_mapping(memfd: MemfdBacking) -> None:
    memfd.write(0, b"x" * memfd.size)
    assert allocated(fd_of(memfd)) == memfd.size
    with mmap.mmap(fd_of(memfd), memfd.size) as other:
        assert other[4 * PAGE : 4 * PAGE + 1] == b"x"
        memfd.discard(4 * PAGE, 8 * PAGE)
        assert allocated(fd_of(memfd)) == memfd.size - 8 * PAGE
        assert other[4 * PAGE : 4 * PAGE + 1] == b"\0"
    assert memfd.read(3 * PAGE, 2) == b"xx"
    assert memfd.read(4 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
    assert memfd.read(12 * PAGE, 2) == b"xx"
    assert os.fstat(fd_of(memfd)).st_size == memfd.size


def test_control_dontneed_on_a_shared_mapping_of_a_memfd_frees_nothing() -> None:
    # Why discard() is more than madvise(): the obvious call succeeds, and the memory stays where it
    # is.
    fd = os.memfd_create("control", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * PAGE)
    with mmap.mmap(fd, 4 * PAGE) as mapping:
        mapping[:] = b"x" * (4 * PAGE)
        assert allocated(fd) == 4 * PAGE
        mapping.madvise(mmap.MADV_DONTNEED)
        assert allocated(fd) == 4 * PAGE
        assert mapping[:1] == b"x"
    os.close(fd)


def test_discarding_a_hole_is_fine(memfd: MemfdBacking) -> None:
    memfd.discard(0, memfd.size)
    memfd.discard(0, memfd.size)
    assert allocated(fd_of(memfd)) == 0


def test_discard_says_why_it_failed(memfd: MemfdBacking) -> None:
    with pytest.raises(OSError, match=r"fallocate\(PUNCH_HOLE, 0x0, 0x0\)"):
        memfd.discard(0, 0)


def test_a_transfer_longer_than_one_call_can_move(
    memfd: MemfdBacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "_MAX_TRANSFER", 3)
    data = bytes(range(256)) * 3
    memfd.write(7, data)
    assert memfd.read(7, len(data)) == data
    assert memfd.read(6, 2) == b"\0\0"


def test_a_file_that_somebody_cut_short_is_an_error_and_not_short_data(
    memfd: MemfdBacking,
) -> None:
    os.ftruncate(fd_of(memfd), PAGE)
    assert memfd.read(0, PAGE) == bytes(PAGE)
    with pytest.raises(EOFError, match="ends at 0x1000, 0x1 bytes short"):
        memfd.read(0, PAGE + 1)


def test_closing_gives_back_descriptor_and_memory() -> None:
    before = open_files()
    made = MemfdBacking("to-be-closed", 16 * PAGE)
    fd = fd_of(made)
    assert open_files() > before
    assert "to-be-closed" in Path("/proc/self/maps").read_text()
    made.close()
    made.close()
    assert open_files() == before
    assert "to-be-closed" not in Path("/proc/self/maps").read_text()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MemfdBacking("ram", 16 * PAGE),
        lambda: StandInPrivate("ram", 16 * PAGE),
        lambda: RamBlock.create("ram", 16 * PAGE, private="stand-in"),
    ],
)
def test_what_is_forgotten_is_not_leaked(make: Callable[[], object]) -> None:
    before = open_files()
    made = make()
    assert open_files() > before
    del made
    assert open_files() == before


@pytest.mark.parametrize("size", [1 << 62, 1 << 50])
def test_a_memfd_that_cannot_be_had_holds_nothing(size: int) -> None:
    before = open_files()
    with pytest.raises(OSError, match=r"memfd 'ram' of .* TiB"):
        MemfdBacking("ram", size)
    assert open_files() == before


def test_a_name_that_the_kernel_refuses() -> None:
    with pytest.raises(OSError, match="memfd 'xxx"):
        MemfdBacking("x" * 300, PAGE)


# -- anonymous -------------------------------------------------------------------------------------


def test_anonymous_memory_has_no_descriptor_and_no_count(anonymous: AnonymousBacking) -> None:
    assert anonymous.fd is None
    assert anonymous.allocated_bytes() is None  # type: ignore[func-returns-value]  # that is the answer


def test_anonymous_memory_reads_and_writes(anonymous: AnonymousBacking) -> None:
    anonymous.write(PAGE - 1, b"ab")
    assert anonymous.read(PAGE - 2, 4) == b"\0ab\0"
    write_own_memory(anonymous.address + PAGE, b"c")
    assert anonymous.read(PAGE - 1, 2) == b"ac"


def test_anonymous_memory_is_really_freed() -> None:
    made = AnonymousBacking(16 * MIB)
    before = resident(made.address)
    assert made.read(0, made.size) == bytes(made.size)
    assert resident(made.address) == before  # reading maps the zero page
    made.write(0, b"x" * (8 * MIB))
    assert resident(made.address) == before + 8 * MIB
    made.discard(2 * MIB, 4 * MIB)
    assert resident(made.address) == before + 4 * MIB
    assert made.read(2 * MIB, 4 * MIB) == bytes(4 * MIB)
    assert made.read(2 * MIB - 1, 1) == made.read(6 * MIB, 1) == b"x"
    made.close()


# -- the stand-in for guest_memfd ------------------------------------------------------------------


def test_the_stand_in_is_a_memory_of_its_own() -> None:
    stand_in = StandInPrivate("ram", 4 * PAGE)
    assert stand_in.allocated_bytes() == allocated(stand_in.fd) == 0
    stand_in.write(PAGE, b"secret")
    assert stand_in.read(PAGE, 6) == b"secret"
    assert stand_in.allocated_bytes() == PAGE
    stand_in.discard(0, 4 * PAGE)
    assert stand_in.allocated_bytes() == 0
    assert stand_in.read(PAGE, 6) == bytes(6)
    stand_in.close()
    stand_in.close()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (-PAGE, PAGE), (0, 5 * PAGE), (1, PAGE), (0, 1), (4 * PAGE, PAGE)]
)
def test_the_stand_in_frees_whole_pages_of_itself(offset: int, size: int) -> None:
    stand_in = StandInPrivate("ram", 4 * PAGE)
    with pytest.raises(UsageError):
        stand_in.discard(offset, size)
    stand_in.close()


def test_the_stand_in_refuses_accesses_outside() -> None:
    stand_in = StandInPrivate("ram", PAGE)
    with pytest.raises(UsageError):
        stand_in.read(PAGE - 1, 2)
    with pytest.raises(UsageError):
        stand_in.write(PAGE - 1, b"ab")
    assert stand_in.allocated_bytes() == 0
    stand_in.close()


# -- huge pages ------------------------------------------------------------------------------------


@require_hugetlb
def test_huge_pages() -> None:
    made = MemfdBacking("ram", 4 * MIB, 2 * MIB)
    fd = fd_of(made)
    assert (made.page_size, allocated(fd)) == (2 * MIB, 0)
    made.write(2 * MIB - 1, b"ab")  # hugetlbfs has no write(2)
    assert allocated(fd) == 4 * MIB
    assert made.read(2 * MIB - 2, 4) == b"\0ab\0"
    made.discard(0, 2 * MIB)
    assert made.allocated_bytes() == 2 * MIB
    assert made.read(2 * MIB - 2, 4) == b"\0\0b\0"
    made.close()


@require_hugetlb
def test_control_a_hole_of_less_than_a_huge_page_frees_nothing() -> None:
    # Why only whole ones are freed: the call succeeds, zeroes what it was asked for, and the page
    # stays.
    made = MemfdBacking("ram", 2 * MIB, 2 * MIB)
    made.write(0, b"x" * (2 * MIB))
    made.discard(0, MIB)
    assert made.allocated_bytes() == 2 * MIB
    assert made.read(MIB - 1, 2) == b"\0x"
    made.close()


def test_more_huge_pages_than_there_are() -> None:
    before = open_files()
    with pytest.raises(OSError, match="memfd 'ram'"):
        MemfdBacking("ram", 1 << 50, 2 * MIB)
    assert open_files() == before


def test_writing_where_nothing_is_mapped_is_an_error_and_no_signal() -> None:
    with pytest.raises(OSError, match="process_vm_writev at 0x1000: Bad address"):
        write_own_memory(0x1000, b"x")
