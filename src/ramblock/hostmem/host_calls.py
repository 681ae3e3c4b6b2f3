# SPDX-License-Identifier: Apache-2.0
"""System calls that the standard library lacks, through libc; errors are ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Collection
from mmap import mmap
from typing import Any

from ramblock.uapi.mempolicy import MempolicyMode
from ramblock.units import KIB

# include/uapi/asm-generic/mman-common.h; from Linux 5.14 on.
_MADV_POPULATE_WRITE = 23
# arch/x86/entry/syscalls/syscall_64.tbl; scripts/syscall.tbl has the number of every newer
# architecture. libc has no name for it (that is in libnuma).
_NR_MBIND = 237 if os.uname().machine == "x86_64" else 235

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.syscall.restype = ctypes.c_long
for _transfer in (libc.process_vm_readv, libc.process_vm_writev):
    _pieces = (ctypes.c_void_p, ctypes.c_ulong)
    _transfer.argtypes = (ctypes.c_int, *_pieces, *_pieces, ctypes.c_ulong)
    _transfer.restype = ctypes.c_ssize_t


class _Iovec(ctypes.Structure):
    # include/uapi/linux/uio.h
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def failure(call: str) -> OSError:
    """Make the error of the libc call that has just failed."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def address_of(mapping: mmap) -> int:
    """Tell the host virtual address of *mapping*. It does not keep the mapping alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def read_own_memory(address: int, size: int) -> bytes:
    """Copy bytes from *address* of ours; OSError (EFAULT) where a load would be a SIGBUS."""
    target = ctypes.create_string_buffer(size)
    _copy(libc.process_vm_readv, target, address)
    return target.raw


def write_own_memory(address: int, data: bytes) -> None:
    """Copy *data* to *address* of ours; OSError (EFAULT): only as far as there are pages."""
    _copy(libc.process_vm_writev, ctypes.create_string_buffer(bytes(data), len(data)), address)


def _copy(call: Any, buffer: ctypes.Array[ctypes.c_char], address: int) -> None:
    done, size = 0, len(buffer)
    while done < size:
        local = _Iovec(ctypes.addressof(buffer) + done, size - done)
        remote = _Iovec(address + done, size - done)
        count = call(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count <= 0:
            raise failure(f"{call.__name__} at {address + done:#x}")
        done += count


def populate(address: int, size: int) -> None:
    """Put a page everywhere in a range that nobody uses; OSError (EFAULT, ENOMEM): in a part."""
    if libc.madvise(address, size, _MADV_POPULATE_WRITE) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:
        raise failure(f"madvise at {address:#x}")
    # A kernel older than 5.14: write zeros. Not fallocate(2): anonymous memory has no descriptor
    # for it, and on hugetlbfs it ignores the mapping's NUMA policy.
    step = 64 * KIB  # stays in the processor's cache: as fast as a write of one byte to each page
    for start in range(address, address + size, step):
        write_own_memory(start, bytes(min(step, address + size - start)))


def set_memory_policy(address: int, size: int, mode: MempolicyMode, nodes: Collection[int]) -> None:
    """Set the nodes of the pages to come; OSError: EINVAL (no memory there, forbidden), ENOSYS."""
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = max(nodes) // bits + 1
    mask = (ctypes.c_ulong * words)()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    numbers = map(ctypes.c_long, (_NR_MBIND, address, size, mode))
    # The kernel looks at one bit less than it is told (get_nodes(), mm/mempolicy.c).
    if libc.syscall(*numbers, mask, ctypes.c_ulong(words * bits + 1), ctypes.c_ulong(0)):
        raise failure(f"mbind({mode.name}, nodes {sorted(nodes)})")
