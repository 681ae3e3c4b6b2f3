# SPDX-License-Identifier: Apache-2.0
"""The memory behind a block: its shared side, and the protocol of its private side."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Protocol

from ramblock.errors import UsageError
from ramblock.hostmem.host_calls import address_of, failure, libc, write_own_memory
from ramblock.hostmem.host_facts import describe_shortage
from ramblock.process import OfOneProcess
from ramblock.units import PAGE_SIZE, check_range, format_size

# include/uapi/linux/falloc.h: KEEP_SIZE and PUNCH_HOLE.
_PUNCH_HOLE = ctypes.c_int(0x01 | 0x02)
# include/uapi/linux/memfd.h: the log2 of the page size sits in bits 26 and up.
_MFD_HUGE_SHIFT = 26
# include/uapi/asm-generic/mman-common.h; the mmap module has it only from Python 3.13 on.
_MAP_NORESERVE = 0x4000
# Linux moves at most this many bytes in one read or write (MAX_RW_COUNT, include/linux/fs.h).
_MAX_TRANSFER = 0x7FFF_F000
# The answer of memfd_create(2) and mmap(2) where there is no such pool, or not enough in it.
_ABOUT_THE_POOL = {errno.ENOMEM, errno.ENOENT, errno.EINVAL, errno.ENODEV, errno.ENOSPC}


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


class HostMemory(Protocol):
    """A place on this host."""

    @property
    def fd(self) -> int | None:
        """The descriptor; None for anonymous memory."""

    @property
    def address(self) -> int:
        """Host virtual address of the first byte."""

    @property
    def size(self) -> int:
        """In bytes."""


class SharedBacking(HostMemory, Protocol):
    """Memory that the host and its devices read."""

    @property
    def page_size(self) -> int:
        """The least that can be freed, in bytes."""

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
    """Free a range of the file, which reads as zeros then; OSError: part of it may be freed."""
    if libc.fallocate(fd, _PUNCH_HOLE, offset, size) != 0:
        raise failure(f"fallocate(PUNCH_HOLE, {offset:#x}, {size:#x})")


def read_fd(fd: int, offset: int, size: int) -> bytes:
    """Read exactly *size* bytes; beyond the end of the file is an EOFError."""
    parts = []
    done = 0
    while done < size:
        data = os.pread(fd, min(size - done, _MAX_TRANSFER), offset + done)
        if not data:
            end = offset + done
            raise EOFError(f"descriptor {fd} ends at {end:#x}, {size - done:#x} bytes short")
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def write_fd(fd: int, offset: int, data: bytes) -> None:
    """Write all of *data*."""
    done = os.pwrite(fd, data, offset) if len(data) <= _MAX_TRANSFER else 0
    view = memoryview(data)
    while done < len(data):
        done += os.pwrite(fd, view[done : done + _MAX_TRANSFER], offset + done)


class _Memfd(OfOneProcess):
    # The calls that need the descriptor alone.
    def __init__(self, name: str, size: int, flags: int = 0) -> None:
        self.size = size
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | flags)
        self._close_fd = weakref.finalize(self, os.close, self.fd)

    def read(self, offset: int, size: int) -> bytes:
        # pread does not allocate, where a load through a mapping would.
        return read_fd(self.fd, offset, size)

    def write(self, offset: int, data: bytes) -> None:
        write_fd(self.fd, offset, data)

    def discard(self, offset: int, size: int) -> None:
        # Frees pages in the file and in every mapping of it. MADV_DONTNEED would succeed and free
        # nothing: it drops page table entries, not pages (firecracker #6167).
        punch_hole(self.fd, offset, size)

    def allocated_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        self._close_fd()


class MemfdBacking(_Memfd):
    """A memfd, mapped shared; hugetlbfs for a *page_size* above the host's. OSError: holds none."""

    def __init__(self, name: str, size: int, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        self._huge = page_size > PAGE_SIZE
        made, mapped = 0, mmap.MAP_SHARED | _MAP_NORESERVE
        if self._huge:
            made = os.MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
            mapped = mmap.MAP_SHARED  # and so the pool's pages are reserved now
        try:
            super().__init__(name, size, made)
            try:
                os.ftruncate(self.fd, size)
                self._mapping = mmap.mmap(self.fd, size, mapped)
            except OSError:
                self._close_fd()
                raise
        except OSError as error:
            text = f"memfd {name!r} of {format_size(size)}: {error.strerror}"
            if self._huge and error.errno in _ABOUT_THE_POOL:
                text += f"; {describe_shortage(size, page_size)}"
            raise OSError(error.errno, text) from error
        self.address = address_of(self._mapping)

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in."""
        if self._huge:
            # hugetlbfs has no write(2) (fs/hugetlbfs/inode.c, hugetlbfs_file_operations).
            write_own_memory(self.address + offset, data)
        else:
            write_fd(self.fd, offset, data)

    def close(self) -> None:
        """Unmap and close."""
        self._mapping.close()
        self._close_fd()


class AnonymousBacking(OfOneProcess):
    """Private anonymous memory, without a descriptor. OSError: the kernel has no room."""

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
        """MADV_DONTNEED: on private anonymous memory, and only there, it frees pages."""
        self._mapping.madvise(mmap.MADV_DONTNEED, offset, size)

    def allocated_bytes(self) -> None:
        """Not told by the kernel for one mapping."""

    def close(self) -> None:
        """Unmap."""
        self._mapping.close()


class StandInPrivate(_Memfd):
    """A memfd in the role of guest_memfd, for hosts without KVM. OSError: there is no room."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"{name}-private", size)
        os.ftruncate(self.fd, size)

    def discard(self, offset: int, size: int) -> None:
        """Punch a hole; whole pages, as with guest_memfd."""
        check_range(offset, size, limit=self.size, align=PAGE_SIZE, what="private backing")
        punch_hole(self.fd, offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """Read as the guest does; a hole reads as zeros."""
        check_range(offset, size, limit=self.size, align=1, what="private backing")
        return read_fd(self.fd, offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write as the guest does."""
        check_range(offset, len(data), limit=self.size, align=1, what="private backing")
        write_fd(self.fd, offset, data)


def check_private(private: object, size: int, name: str) -> None:
    """Raise :class:`UsageError` unless *private* can back a block of *size* bytes."""
    there = getattr(private, "size", None)
    if not callable(getattr(private, "discard", None)) or not isinstance(there, int):
        text = f"block {name!r}: {private!r} is not a private backing"
        expected = 'None, "stand-in", or an object with fd, size and discard(offset, size)'
        raise UsageError(text, value=private, expected=expected)
    if there < size:
        text = f"block {name!r} has {size:#x} bytes, its private backing only {there:#x}"
        raise UsageError(text, value=there, expected=f"at least {size:#x}")
