# SPDX-License-Identifier: Apache-2.0
"""
An IOMMU that holds on to its pages, as hardware pins memory, for runs without coordination.

VFIO pins mapped pages. When the host frees a pinned page (a hole is punched, MADV_REMOVE), the file
loses it and the device keeps it: its writes go to a page that nobody else sees, and the guest,
which gets a new page at that place, never sees them. :meth:`PinnedIommu.about_to_free` acts like
the kernel: the mapping goes on with a page of its own that has the old content.
"""

from __future__ import annotations

import errno
import os
import weakref

from ramblock.dma.soft import SoftIommu
from ramblock.dma.target import HostRange
from ramblock.hostmem.backing import read_fd, write_fd

__all__ = ["PinnedIommu"]


class PinnedIommu(SoftIommu):
    """A software IOMMU whose mappings outlive the memory behind them."""

    def __init__(self, *, max_mappings: int | None = None) -> None:
        # It is never asked to cut by a mapper: nobody tells it anything. It cuts to put orphans in.
        super().__init__(cut=True, max_mappings=max_mappings)
        self._orphans = os.memfd_create("orphaned-pages", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._orphans)
        self._used = 0
        #: Bytes that devices still reach and the guest does not.
        self.orphaned_bytes = 0

    def about_to_free(self, gpa: int, size: int) -> None:
        """Keep the pages of ``[gpa, gpa + size)`` that are mapped, as pinning does."""
        for mapping in self.mappings():
            start, end = max(mapping.iova, gpa), min(mapping.end, gpa + size)
            if start < end and mapping.memory.fd != self._orphans:
                self._orphan(mapping.part(start, end).memory, start)

    def _orphan(self, memory: HostRange, iova: int) -> None:
        """Let the mapping go on with pages of its own, which have the old content."""
        assert memory.fd is not None  # the run's blocks are memfds
        self._copy_data(memory.fd, memory.offset, memory.size)
        orphan = HostRange(self._orphans, self._used, 0, memory.size)
        self._used += memory.size
        os.ftruncate(self._orphans, self._used)
        self.orphaned_bytes += memory.size
        self.unmap(iova, memory.size)
        self.map(iova, orphan)

    def _copy_data(self, fd: int, offset: int, size: int) -> None:
        """Copy the content; holes read as zeros in the copy too."""
        position, end = offset, offset + size
        while position < end:
            try:
                data = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # a hole to the end of the file
                raise
            if data >= end:
                return
            position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            write_fd(self._orphans, self._used + data - offset, read_fd(fd, data, position - data))
