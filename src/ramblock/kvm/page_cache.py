# SPDX-License-Identifier: Apache-2.0
"""
How many pages a file without a block count holds.

fstat() says 0 blocks for any guest_memfd, empty or full: nothing in virt/kvm/guest_memfd.c keeps
``i_blocks``. Its pages are the page cache of its inode, though, and cachestat(2), which is older
than guest_memfd (Linux 6.5 and 6.8), counts that.
"""

from __future__ import annotations

import ctypes
import errno
import os

from ramblock.uapi.mman import Cachestat, CachestatRange
from ramblock.units import PAGE_SIZE

__all__ = ["cached_bytes"]

# scripts/syscall.tbl: the same number on every architecture.
_NR_CACHESTAT = 451
# Not built in, or forbidden (a seccomp filter answers EPERM or ENOSYS).
_NOT_TOLD = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def cached_bytes(fd: int) -> int | None:
    """
    Count the bytes of the file's pages that are in memory; None where the kernel does not tell.

    The kernel walks over the pages that are there, so it takes time for a large file.

    :raises OSError: EBADF and the like.
    """
    everything = CachestatRange(off=0, len=0)
    result = Cachestat()
    failed = _libc.syscall(
        ctypes.c_long(_NR_CACHESTAT),
        ctypes.c_uint(fd),
        ctypes.byref(everything),
        ctypes.byref(result),
        ctypes.c_uint(0),
    )
    if failed:
        number = ctypes.get_errno()
        if number in _NOT_TOLD:
            return None
        raise OSError(number, f"cachestat of descriptor {fd}: {os.strerror(number)}")
    return result.nr_cache * PAGE_SIZE
