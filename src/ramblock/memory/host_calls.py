# SPDX-License-Identifier: Apache-2.0
"""System calls that the standard library lacks, through libc, with errno turned into ``OSError``."""

from __future__ import annotations

import ctypes
import os
from mmap import mmap

__all__ = ["address_of", "punch_hole", "write_own_memory"]

# include/uapi/linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.process_vm_writev.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_writev.restype = ctypes.c_ssize_t


class _Iovec(ctypes.Structure):
    """struct iovec, include/uapi/linux/uio.h."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def punch_hole(fd: int, offset: int, size: int) -> None:
    """
    Free ``[offset, offset + size)`` of the file behind *fd*; it reads as zeros afterwards (fallocate(2)).

    :raises OSError: The kernel refused. Part of the range may be freed.
    """
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, size) != 0:
        number = ctypes.get_errno()
        raise OSError(
            number, f"fallocate(PUNCH_HOLE, {offset:#x}, {size:#x}): {os.strerror(number)}"
        )


def address_of(mapping: mmap) -> int:
    """Tell the host virtual address of *mapping*. It does not keep the mapping alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def write_own_memory(address: int, data: bytes) -> None:
    """
    Copy *data* to *address* of this process; a page that cannot be had is EFAULT, not SIGBUS (process_vm_writev(2)).

    :raises OSError: EFAULT. Bytes before the page that is missing may be written.
    """
    done = 0
    source = ctypes.create_string_buffer(data, len(data))
    while done < len(data):
        local = _Iovec(ctypes.addressof(source) + done, len(data) - done)
        remote = _Iovec(address + done, len(data) - done)
        count = _libc.process_vm_writev(
            os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0
        )
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(
                number, f"process_vm_writev to {address + done:#x}: {os.strerror(number)}"
            )
        done += count
