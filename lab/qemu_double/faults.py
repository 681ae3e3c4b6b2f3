# SPDX-License-Identifier: Apache-2.0
"""Calls of QEMU's that a test makes fail: the other side of ``shim/faults.c``."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

__all__ = ["Call", "Faults", "Tally"]

_ENTRY = struct.Struct("=5I")  # skip, count, errno, calls, failed


class Call(IntEnum):
    """A call that can fail on purpose; the number is the place in the table."""

    MAP = 0
    """
    VFIO_IOMMU_MAP_DMA, IOMMU_IOAS_MAP, IOMMU_IOAS_MAP_FILE. vfio-user has none of them: its server
    refuses.
    """
    UNMAP = 1
    TO_PRIVATE = 2
    """KVM_SET_MEMORY_ATTRIBUTES with the private bit."""
    TO_SHARED = 3
    PUNCH = 4
    """fallocate with FALLOC_FL_PUNCH_HOLE: both sides of a page are freed with it."""
    MADVISE = 5
    """madvise with MADV_REMOVE or MADV_DONTNEED."""


class Tally(NamedTuple):
    """How many calls there were since the guest started."""

    calls: int
    failed: int


class Faults:
    """The table, in a file that QEMU maps too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_ENTRY.size * len(Call)))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._table = mmap.mmap(fd, _ENTRY.size * len(Call))
        finally:
            os.close(fd)

    def arm(self, call: Call, *, skip: int = 0, count: int = 1, error: int = errno.ENOMEM) -> None:
        """
        Let *skip* calls from now on through, and *count* after them fail with *error*.

        QEMU has to be idle, as between two orders.

        :raises ValueError: A negative number, or no errno.
        """
        if skip < 0 or count < 0 or error <= 0:
            raise ValueError(
                f"skip {skip}, count {count}, errno {error}: expected 0 or more, and an errno"
            )
        struct.pack_into("=3I", self._table, call * _ENTRY.size, skip, count, error)

    def tally(self, call: Call) -> Tally:
        """Count the calls so far."""
        return Tally(*_ENTRY.unpack_from(self._table, call * _ENTRY.size)[3:])

    def close(self) -> None:
        """Let go of the table; QEMU keeps its own view."""
        self._table.close()
