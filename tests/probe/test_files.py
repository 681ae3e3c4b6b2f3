"""The memory behind descriptors: known once, never trusted to stay."""

import os
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import pytest

from descriptors import open_descriptors
from ramblock.probe.files import FileTable, MemoryFile
from require import require_hugetlb

P = 4096


@pytest.fixture
def table() -> Iterator[FileTable]:
    table = FileTable()
    yield table
    table.close()


def memfd(size: int = 4 * P, flags: int = 0) -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, size)
    return fd


def test_the_same_file_is_kept_once() -> None:
    before = open_descriptors()
    fd, table = memfd(), FileTable()
    files = [table.add(lambda: os.dup(fd)) for _ in range(1000)]
    assert len(set(map(id, files))) == len(table) == 1
    assert len(open_descriptors()) == len(before) + 2
    for file in files[1:]:
        table.drop(file)
    assert files[0].read(0, 4) == bytes(4)
    table.drop(files[0])
    assert len(table) == 0
    os.close(fd)
    assert open_descriptors() == before


def test_what_is_no_memory_is_closed(tmp_path: Path, table: FileTable) -> None:
    before = open_descriptors()
    pipe = os.pipe()
    for fd in (*pipe, os.open(tmp_path, os.O_RDONLY), os.open("/dev/zero", os.O_RDWR)):
        with pytest.raises(ValueError, match="no regular file"):
            table.add(lambda fd=fd: fd)  # type: ignore[misc]
    assert open_descriptors() == before


def test_reads_and_writes(table: FileTable) -> None:
    file = table.add(memfd)
    file.write(P - 2, b"data")
    assert file.read(P - 2, 4) == b"data"
    assert "memfd:ram" in file.name


def test_a_hole_is_read_without_being_filled(table: FileTable) -> None:
    fd = memfd()
    file = table.add(lambda: fd)
    assert file.read(0, 4 * P) == bytes(4 * P)
    assert os.fstat(fd).st_blocks == 0


def test_a_file_that_is_open_for_reading_is_read(tmp_path: Path, table: FileTable) -> None:
    (tmp_path / "ram").write_bytes(b"x" * P)
    file = table.add(lambda: os.open(tmp_path / "ram", os.O_RDONLY))
    assert file.read(0, 2) == b"xx"
    with pytest.raises(OSError, match="ermission"):
        file.write(0, b"y")


def _shrunken(file: MemoryFile, fd: int) -> None:
    with pytest.raises(OSError, match="ends at 0x1000"):
        file.read(P, 8)
    with pytest.raises(OSError, match="ends at 0x1000"):
        file.read(P - 4, 8)
    with pytest.raises(OSError, match="ends at 0x1000"):
        file.write(2 * P, b"data")
    # Nothing was made long again, which is what pwrite(2) would do.
    assert os.fstat(fd).st_size == P
    assert file.read(0, 8) == bytes(8)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_file_that_shrinks_is_an_error_and_no_signal(table: FileTable, used_before: bool) -> None:
    fd = memfd()
    file = table.add(lambda: fd)
    if used_before:
        file.write(3 * P, b"data")
    os.ftruncate(fd, P)
    _shrunken(file, fd)


def test_a_file_that_shrinks_between_the_look_and_the_write(
    table: FileTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = memfd()
    file = table.add(lambda: fd)
    file.write(3 * P, b"data")
    os.ftruncate(fd, P)
    monkeypatch.setattr(MemoryFile, "size", lambda self: 4 * P)
    with pytest.raises(OSError, match="Bad address"):
        file.write(3 * P, b"data")
    assert os.fstat(fd).st_size == P


def test_a_file_that_grows(table: FileTable) -> None:
    fd = memfd()
    file = table.add(lambda: fd)
    file.write(0, b"a")
    os.ftruncate(fd, 100 * P)
    file.write(99 * P, b"b")
    assert file.read(99 * P, 1) == b"b"


@require_hugetlb
def test_huge_pages(table: FileTable) -> None:
    huge = 2 << 20
    fd = memfd(2 * huge, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    file = table.add(lambda: fd)
    file.write(huge - 2, b"data")
    assert file.read(huge - 2, 4) == b"data"
    with mmap(fd, huge) as seen:
        assert seen[huge - 2 :] == b"da"
    os.ftruncate(fd, huge)
    with pytest.raises(OSError, match="ends at"):
        file.write(huge, b"data")
    with pytest.raises(OSError, match="ends at"):
        file.read(huge, 4)
