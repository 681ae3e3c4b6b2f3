# SPDX-License-Identifier: Apache-2.0
"""
The memory behind descriptors that a client sends.

A client sends the same memfd with every map, each time as a new descriptor, thousands of times: one
of them is kept.

A client may make its file shorter at any moment. So nothing here is ever loaded from or stored to a
mapping, which would be a SIGBUS: pread(2) tells, and for writes the kernel copies
(process_vm_writev(2)). Not pwrite(2), which would make the file long again, and which hugetlbfs
does not have.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ramblock.errors import describe_range
from ramblock.hostmem.host_calls import address_of, write_own_memory

__all__ = ["FileTable", "MemoryFile"]

# include/uapi/linux/fcntl.h; Python 3.13 has it by name.
_F_SEAL_FUTURE_WRITE = 0x0010


class MemoryFile:
    """
    One file of a client's memory.

    :param fd: Taken over.
    """

    def __init__(self, fd: int, key: tuple[int, int, int]) -> None:
        self.key = key
        self._fd = fd
        self._mapping: mmap.mmap | None = None
        self._address = 0
        #: Windows that refer to it.
        self.users = 0

    @property
    def name(self) -> str:
        """A description for people: ``/memfd:ram (deleted)``."""
        try:
            return str(Path(f"/proc/self/fd/{self._fd}").readlink())
        except OSError:
            return f"inode {self.key[1]}"

    def refusal(self, *, writable: bool) -> tuple[int, str] | None:
        """
        Tell why the device could not be given this access; None: it can.

        As (errno, text), with the number of the mmap(2) that a server would try.
        """
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        if flags & os.O_PATH:
            return errno.EBADF, "the descriptor is O_PATH"
        mode = flags & os.O_ACCMODE
        if mode == os.O_WRONLY:  # a mapping reads as well, whatever it is for
            return errno.EACCES, "the descriptor is open for writing only"
        if not writable:
            return None
        if mode == os.O_RDONLY:
            return errno.EACCES, "the descriptor is open for reading only"
        try:
            seals = fcntl.fcntl(self._fd, fcntl.F_GET_SEALS)
        except OSError:  # of no file system that has seals
            return None
        if seals & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE):
            return errno.EPERM, "the memory is sealed against writing"
        return None

    def size(self) -> int:
        """Tell how long it is now, in bytes."""
        return os.fstat(self._fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        """
        Read bytes; a hole reads as zeros and stays one.

        :raises OSError: They are not all there any more, or cannot be read.
        """
        parts = []
        while size:
            data = os.pread(self._fd, size, offset)
            if not data:
                raise self._too_short(offset, size)
            parts.append(data)
            offset += len(data)
            size -= len(data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """
        Write bytes.

        :raises OSError: They are not all there any more, or may not be written. Some of them may
            be.
        """
        if offset + len(data) > self.size():
            raise self._too_short(offset, len(data))
        write_own_memory(self._address_of(offset, len(data)), data)

    def _address_of(self, offset: int, size: int) -> int:
        if self._mapping is None or offset + size > len(self._mapping):
            self._unmap()
            try:
                # ACCESS_WRITE: shared. Nothing is allocated before it is written.
                self._mapping = mmap.mmap(self._fd, self.size(), access=mmap.ACCESS_WRITE)
            except ValueError:  # it has become shorter just now
                raise self._too_short(offset, size) from None
            self._address = address_of(self._mapping)
        return self._address + offset

    def _too_short(self, offset: int, size: int) -> OSError:
        return OSError(
            f"{describe_range(offset, size)} of {self.name}: the file ends at {self.size():#x}"
        )

    def _unmap(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def close(self) -> None:
        """Let go of the memory."""
        self._unmap()
        os.close(self._fd)


class FileTable:
    """The files of one client, each once."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int, int], MemoryFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def add(self, take: Callable[[], int]) -> MemoryFile:
        """
        Take a descriptor over: it is kept, or closed where its file is known already.

        :param take: Hands the descriptor out.
        :raises ValueError: It is no file that memory can be in. It is closed.
        """
        fd = take()
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("the descriptor is no regular file, and so no memory")
            # Opened for reading only is another thing than opened for both.
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH)
        except BaseException:
            os.close(fd)
            raise
        key = (status.st_dev, status.st_ino, mode)
        known = self._files.get(key)
        if known is not None:
            os.close(fd)
        else:
            known = self._files[key] = MemoryFile(fd, key)
        known.users += 1
        return known

    def drop(self, file: MemoryFile) -> None:
        """Take note that one window less refers to *file*."""
        file.users -= 1
        if not file.users:
            del self._files[file.key]
            file.close()

    def close(self) -> None:
        """Close all of them."""
        for file in self._files.values():
            file.close()
        self._files.clear()
