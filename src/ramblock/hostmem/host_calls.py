# SPDX-License-Identifier: Apache-2.0
"""System calls that the standard library lacks, through libc, with errno turned into ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Collection
from mmap import mmap
from typing import Any

from ramblock.uapi.mempolicy import MempolicyMode
from ramblock.units import PAGE_SIZE

__all__ = [
    "address_of",
    "populate",
    "read_own_memory",
    "set_memory_policy",
    "write_own_memory",
]

# include/uapi/asm-generic/mman-common.h; from Linux 5.14 on.
_MADV_POPULATE_WRITE = 23
# arch/x86/entry/syscalls/syscall_64.tbl; scripts/syscall.tbl has the number of every newer architecture. libc has no name
# for it (that is in libnuma).
_NR_MBIND = 237 if os.uname().machine == "x86_64" else 235
# include/uapi/linux/uio.h: how many pieces one process_vm_writev(2) takes.
_UIO_MAXIOV = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
for _transfer in (_libc.process_vm_readv, _libc.process_vm_writev):
    _transfer.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    _transfer.restype = ctypes.c_ssize_t


class _Iovec(ctypes.Structure):
    """struct iovec, include/uapi/linux/uio.h."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def address_of(mapping: mmap) -> int:
    """Tell the host virtual address of *mapping*. It does not keep the mapping alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def read_own_memory(address: int, size: int) -> bytes:
    """
    Copy *size* bytes from *address* of this process; a page that cannot be had is EFAULT, not SIGBUS (process_vm_readv(2)).

    :raises OSError: EFAULT.
    """
    target = ctypes.create_string_buffer(size)
    _copy(_libc.process_vm_readv, target, address)
    return target.raw


def write_own_memory(address: int, data: bytes) -> None:
    """
    Copy *data* to *address* of this process; a page that cannot be had is EFAULT, not SIGBUS (process_vm_writev(2)).

    :raises OSError: EFAULT. Bytes before the page that is missing may be written.
    """
    _copy(_libc.process_vm_writev, ctypes.create_string_buffer(bytes(data), len(data)), address)


def _copy(call: Any, buffer: ctypes.Array[ctypes.c_char], address: int) -> None:
    done, size = 0, len(buffer)
    while done < size:
        local = _Iovec(ctypes.addressof(buffer) + done, size - done)
        remote = _Iovec(address + done, size - done)
        count = call(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{call.__name__} at {address + done:#x}: {os.strerror(number)}")
        done += count


def populate(address: int, size: int) -> None:
    """
    Put a page everywhere in ``[address, address + size)`` of this process, which may be written (madvise(2)).

    :raises OSError: EFAULT: a page cannot be had, and touching it would be a SIGBUS. ENOMEM. Some pages may be there.
    """
    if _libc.madvise(address, size, _MADV_POPULATE_WRITE) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise OSError(number, f"{os.strerror(number)} at {address:#x}")
    _touch(address, size)


def _touch(address: int, size: int) -> None:
    """
    :func:`populate` for a kernel older than 5.14: write a zero to each page, which has none of anybody's bytes yet.

    Not fallocate(2): anonymous memory has no descriptor for it, and on hugetlbfs it does not follow the mapping's NUMA policy.
    """
    zeros = ctypes.create_string_buffer(_UIO_MAXIOV)
    end = address + size
    while address < end:
        pages = min((end - address) // PAGE_SIZE, _UIO_MAXIOV)
        local = _Iovec(ctypes.addressof(zeros), pages)
        remote = (_Iovec * pages)(*(_Iovec(address + page * PAGE_SIZE, 1) for page in range(pages)))
        done = _libc.process_vm_writev(os.getpid(), ctypes.byref(local), 1, remote, pages, 0)
        if done <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} at {address:#x}")
        address += done * PAGE_SIZE


def set_memory_policy(address: int, size: int, mode: MempolicyMode, nodes: Collection[int]) -> None:
    """
    Say which NUMA nodes the pages of ``[address, address + size)`` come from; those that are there stay (mbind(2)).

    :raises OSError: EINVAL: a node has no memory, or is forbidden to this process. ENOSYS: a kernel without NUMA.
    """
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = max(nodes) // bits + 1
    mask = (ctypes.c_ulong * words)()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    failed = _libc.syscall(
        ctypes.c_long(_NR_MBIND),
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        ctypes.c_long(mode),
        mask,
        # The kernel looks at one bit less than it is told (get_nodes(), mm/mempolicy.c).
        ctypes.c_ulong(words * bits + 1),
        ctypes.c_ulong(0),
    )
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"mbind({mode.name}, nodes {sorted(nodes)}): {os.strerror(number)}")
