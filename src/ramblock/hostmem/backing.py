# SPDX-License-Identifier: Apache-2.0
"""
The memory behind a block: its shared side, and the protocol of its private side.

What really frees memory differs by kind, and the wrong call succeeds and frees nothing: MADV_DONTNEED on a mapping of a
memfd drops page table entries, not pages (firecracker #6167). So each kind knows its own way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Protocol

from ramblock.errors import UsageError
from ramblock.hostmem.host_calls import address_of, write_own_memory
from ramblock.hostmem.hugetlb import describe_shortage
from ramblock.process import OfOneProcess
from ramblock.units import PAGE_SIZE, check_range, format_size

__all__ = [
    "AnonymousBacking",
    "MemfdBacking",
    "PrivateBacking",
    "SharedBacking",
    "StandInPrivate",
    "check_private",
    "punch_hole",
    "read_fd",
    "write_fd",
]

# include/uapi/linux/falloc.h: KEEP_SIZE and PUNCH_HOLE.
_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# include/uapi/linux/memfd.h: the log2 of the page size sits in bits 26 and up.
_MFD_HUGE_SHIFT = 26
# include/uapi/asm-generic/mman-common.h; the mmap module has it only from Python 3.13 on.
_MAP_NORESERVE = 0x4000
# Linux moves at most this many bytes in one read or write (MAX_RW_COUNT, include/linux/fs.h).
_MAX_TRANSFER = 0x7FFF_F000


class PrivateBacking(Protocol):
    """Memory that only the guest reads: the kernel's guest_memfd, or something in its role."""

    @property
    def fd(self) -> int:
        """The descriptor that the kernel is told about."""

    @property
    def size(self) -> int:
        """In bytes; at least the block's."""

    def discard(self, offset: int, size: int) -> None:
        """Free ``[offset, offset + size)``; raise when it could not be done."""


class SharedBacking(Protocol):
    """Memory that the host and its devices read."""

    @property
    def fd(self) -> int | None:
        """The descriptor; None for anonymous memory."""

    @property
    def address(self) -> int:
        """Host virtual address of the first byte."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def page_size(self) -> int:
        """What can be freed at once, in bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Copy bytes out; a hole reads as zeros and stays a hole."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""

    def discard(self, offset: int, size: int) -> None:
        """Free whole pages; raises OSError, and part of the range may be freed then."""

    def allocated_bytes(self) -> int | None:
        """Bytes of memory in use, None where the kernel does not tell."""

    def close(self) -> None:
        """Give everything back; nothing may map it any more."""


def punch_hole(fd: int, offset: int, size: int) -> None:
    """
    Free ``[offset, offset + size)`` of the file behind *fd*; it reads as zeros afterwards (fallocate(2)).

    :raises OSError: The kernel refused. Part of the range may be freed.
    """
    if _libc.fallocate(fd, _PUNCH_HOLE, offset, size) != 0:
        number = ctypes.get_errno()
        raise OSError(
            number, f"fallocate(PUNCH_HOLE, {offset:#x}, {size:#x}): {os.strerror(number)}"
        )


def read_fd(fd: int, offset: int, size: int) -> bytes:
    """Read exactly *size* bytes; what lies past the end of the file is an EOFError."""
    data = os.pread(fd, min(size, _MAX_TRANSFER), offset)
    if len(data) == size:
        return data
    parts = [data]
    done = len(data)
    while done < size:
        data = os.pread(fd, min(size - done, _MAX_TRANSFER), offset + done)
        if not data:
            raise EOFError(
                f"descriptor {fd} ends at {offset + done:#x}, {size - done:#x} bytes short"
            )
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def write_fd(fd: int, offset: int, data: bytes) -> None:
    """Write all of *data*."""
    done = os.pwrite(fd, data, offset) if len(data) <= _MAX_TRANSFER else 0
    view = memoryview(data)
    while done < len(data):
        done += os.pwrite(fd, view[done : done + _MAX_TRANSFER], offset + done)


# What memfd_create(2) and mmap(2) say where there is no such pool, or not enough in it.
_ABOUT_THE_POOL = frozenset({errno.ENOMEM, errno.ENOENT, errno.EINVAL, errno.ENODEV, errno.ENOSPC})


class MemfdBacking(OfOneProcess):
    """
    A memfd, mapped shared; with a *page_size* above the host's, on hugetlbfs.

    :raises OSError: The kernel has no memory, no such page size or no huge pages left; nothing is held.
    """

    def __init__(self, name: str, size: int, page_size: int = PAGE_SIZE) -> None:
        self.size = size
        self.page_size = page_size
        self._huge = page_size > PAGE_SIZE
        flags = os.MFD_CLOEXEC
        if self._huge:
            flags |= os.MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
        try:
            fd = os.memfd_create(name, flags)
        except OSError as error:
            raise OSError(
                error.errno,
                f"memfd {name!r} with pages of {format_size(page_size)}: {error.strerror}{self._hint(error)}",
            ) from error
        self._close_fd = weakref.finalize(self, os.close, fd)
        try:
            os.ftruncate(fd, size)
            self._mapping = mmap.mmap(
                fd, size, mmap.MAP_SHARED | (0 if self._huge else _MAP_NORESERVE)
            )
        except OSError as error:
            self._close_fd()
            raise OSError(
                error.errno,
                f"memfd {name!r} of {format_size(size)}: {error.strerror}{self._hint(error)}",
            ) from error
        self.fd = fd
        self.address = address_of(self._mapping)

    def _hint(self, error: OSError) -> str:
        if not self._huge or error.errno not in _ABOUT_THE_POOL:
            return ""
        return f"; {describe_shortage(self.size, self.page_size)}"

    def read(self, offset: int, size: int) -> bytes:
        """Copy bytes out; pread does not allocate, where a load through the mapping would."""
        return read_fd(self.fd, offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        if self._huge:
            # hugetlbfs has no write(2) (fs/hugetlbfs/inode.c, hugetlbfs_file_operations).
            write_own_memory(self.address + offset, data)
        else:
            write_fd(self.fd, offset, data)

    def discard(self, offset: int, size: int) -> None:
        """Punch a hole, which frees pages in the file and in every mapping of it."""
        punch_hole(self.fd, offset, size)

    def allocated_bytes(self) -> int:
        """Bytes of memory in use: the block count of the file."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Unmap and close."""
        self._mapping.close()
        self._close_fd()


class AnonymousBacking(OfOneProcess):
    """
    Private anonymous memory: no descriptor; reading an untouched page maps the zero page and costs nothing.

    :raises OSError: The kernel has no room; nothing is held.
    """

    def __init__(self, size: int) -> None:
        self.fd: int | None = None
        self.size = size
        self.page_size = PAGE_SIZE
        self._mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.address = address_of(self._mapping)

    def read(self, offset: int, size: int) -> bytes:
        """Copy bytes out."""
        return self._mapping[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        self._mapping[offset : offset + len(data)] = data

    def discard(self, offset: int, size: int) -> None:
        """MADV_DONTNEED: on private anonymous memory, and only there, it frees the pages."""
        self._mapping.madvise(mmap.MADV_DONTNEED, offset, size)

    def allocated_bytes(self) -> None:
        """Not told by the kernel for one mapping."""

    def close(self) -> None:
        """Unmap."""
        self._mapping.close()


class StandInPrivate(OfOneProcess):
    """
    A memfd in the role of guest_memfd, for hosts without KVM. ``read`` and ``write`` are the guest's accesses.

    :raises OSError: The kernel has no room; nothing is held.
    """

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create(f"{name}-private", os.MFD_CLOEXEC)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)

    def _check(self, offset: int, size: int, align: int) -> None:
        check_range(offset, size, limit=self.size, align=align, what="private backing")

    def discard(self, offset: int, size: int) -> None:
        """Punch a hole; whole pages, as with guest_memfd."""
        check_range(offset, size, limit=self.size, align=PAGE_SIZE, what="private backing")
        punch_hole(self.fd, offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """Read as the guest does; a hole reads as zeros."""
        self._check(offset, size, 1)
        return read_fd(self.fd, offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write as the guest does."""
        self._check(offset, len(data), 1)
        write_fd(self.fd, offset, data)

    def allocated_bytes(self) -> int:
        """Bytes of memory in use."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor."""
        self._close_fd()


def check_private(private: object, size: int, name: str) -> None:
    """Raise :class:`UsageError` unless *private* can be the private backing of a block of *size* bytes."""
    if not callable(getattr(private, "discard", None)) or not isinstance(
        getattr(private, "size", None), int
    ):
        raise UsageError(
            f"block {name!r}: {private!r} is not a private backing",
            value=private,
            expected='None, "stand-in", or an object with fd, size and discard(offset, size)',
        )
    backing_size: int = private.size  # type: ignore[attr-defined]  # checked above
    if backing_size < size:
        raise UsageError(
            f"block {name!r} has {size:#x} bytes, its private backing only {backing_size:#x}",
            value=backing_size,
            expected=f"at least {size:#x}",
        )
