# SPDX-License-Identifier: Apache-2.0
"""
An iommufd I/O address space as a DMA target, in one of two modes.

*Cutting.* Large pages are off before anything is mapped, the address space is the compat one of its
iommufd, it is mapped with IOMMU_IOAS_MAP and unmapped with VFIO's VFIO_IOMMU_UNMAP_DMA on the same
descriptor: that call, and no other, cuts areas (drivers/iommu/iommufd/vfio_compat.c,
io_pagetable.c, iopt_cut_iova()). One mapping then covers a whole run. The price: every page is an
entry of its own in the IOMMU's page table.

*Native.* IOMMU_IOAS_MAP_FILE, or IOMMU_IOAS_MAP for memory without a descriptor, and
IOMMU_IOAS_UNMAP. Nothing can be cut, and the target is ``exact``: an unmap of several areas may
fail between two of them and not say where, one of a single area is done or not done. So a refusal
(an area that is locked, say) is put back, where it would otherwise poison the memory. It costs one
call per page, as mapping them did.

Neither has a limit on mappings: the kernel charges their memory to the control group.
"""

from __future__ import annotations

import errno
from enum import Enum
from threading import Lock

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.iommufd_calls import (
    alloc_ioas,
    disable_huge_pages,
    iova_window,
    map_file,
    map_user,
    set_compat_ioas,
    unmap,
    unmap_all,
)
from ramblock.dma.iommufd_probe import why_not_cutting
from ramblock.dma.kernel_errors import KernelRefusal
from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.dma.vfio_dma import check_pages, unmap_dma
from ramblock.errors import DmaError, describe_range
from ramblock.process import OfOneProcess
from ramblock.units import PAGE_SIZE

__all__ = ["IommufdIoas", "IommufdMode"]


class IommufdMode(Enum):
    """How mappings are removed."""

    NATIVE = "native"
    """Whole, by IOMMU_IOAS_UNMAP."""
    CUTTING = "cutting"
    """In any parts, by VFIO_IOMMU_UNMAP_DMA, with large pages off."""


class IommufdIoas(OfOneProcess):
    """
    An I/O address space of its own iommufd. Maps for all devices that are attached to it.

    :param cutting: True: cut. False: native. None: cut where this kernel can, found out by trying.
    :param path: iommufd's device file.
    :raises DmaError: There is none, it may not be opened, or *cutting* is True and it does not
        work. Nothing is held.
    """

    def __init__(self, *, cutting: bool | None = None, path: str = "/dev/iommu") -> None:
        self._fd = Descriptor.open(path, "/dev/iommu")
        self._lock = Lock()
        self._has_map_file = True
        #: Why it does not cut although it was free to; None where it does, or was not asked to.
        self.why_native: str | None = None
        try:
            self.mode = self._choose(cutting=cutting)
            #: Its ID, which a device is attached with.
            self.ioas_id = alloc_ioas(self._fd)
            if self.mode is IommufdMode.CUTTING:
                disable_huge_pages(self._fd, self.ioas_id)
                set_compat_ioas(self._fd, self.ioas_id)
            self.refresh()
        except BaseException:
            self._fd.close()
            raise

    def _choose(self, *, cutting: bool | None) -> IommufdMode:
        if cutting is False:
            return IommufdMode.NATIVE
        self.why_native = why_not_cutting(self._fd)
        if self.why_native is None:
            return IommufdMode.CUTTING
        if cutting:
            raise DmaError(
                errno.EOPNOTSUPP, f"this kernel's iommufd does not cut: {self.why_native}"
            )
        return IommufdMode.NATIVE

    def fileno(self) -> int:
        """
        Tell the descriptor, to bind a device to.

        :raises DmaError: EBADF: it is closed.
        """
        return self._fd.fileno()

    def refresh(self) -> None:
        """Ask again which addresses are usable: attached devices decide that."""
        with self._lock:
            window = iova_window(self._fd, self.ioas_id)
        cuts = self.mode is IommufdMode.CUTTING
        self._capabilities = DmaCapabilities(
            # Areas may start anywhere as long as no device is there; ours are made of pages.
            page_size=max(window.alignment, PAGE_SIZE),
            cut=cuts,
            exact=not cuts,
            iova_ranges=window.ranges,
        )
        self._usable = "usable: " + ", ".join(
            describe_range(start, end - start) for start, end in window.ranges
        )

    @property
    def capabilities(self) -> DmaCapabilities:
        """Its abilities; ``exact`` in native mode (see the module)."""
        return self._capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """
        Let devices reach *memory* at *iova*.

        It is pinned, and charged to RLIMIT_MEMLOCK, once a device is attached.

        :raises DmaError: The kernel refused (:data:`~ramblock.dma.kernel_errors.TABLE`); nothing
            has changed.
        """
        check_pages("map", iova, memory.size)
        with self._lock:
            if self.mode is IommufdMode.NATIVE and memory.fd is not None and self._has_map_file:
                try:
                    map_file(
                        self._fd, self.ioas_id, iova, memory, writable=writable, detail=self._usable
                    )
                except KernelRefusal as error:
                    # A descriptor that is no memfd gives EINVAL too; if it was the range, the next
                    # call says so.
                    if error.errno not in (errno.ENOTTY, errno.EINVAL):
                        raise
                    self._has_map_file = error.errno != errno.ENOTTY
                else:
                    return
            map_user(self._fd, self.ioas_id, iova, memory, writable=writable, detail=self._usable)

    def unmap(self, iova: int, size: int) -> int:
        """
        Take ``[iova, iova + size)`` away from devices.

        :return: Bytes really unmapped; when cutting, 0 where nothing was mapped.
        :raises DmaError: Native: ENOENT: nothing is mapped there, or a mapping sticks out. Nothing
            has changed, unless the error is in doubt.
        """
        check_pages("unmap", iova, size)
        with self._lock:
            if self.mode is IommufdMode.CUTTING:
                return unmap_dma(self._fd, iova, size)
            smallest = self._capabilities.page_size
            return unmap(self._fd, self.ioas_id, iova, size, smallest=smallest)

    def close(self) -> None:
        """
        Unmap everything. A device that is still attached reaches nothing any more.

        :raises DmaError: The kernel did not unmap; devices may still reach the range until they are
            closed.
        """
        with self._lock:
            if self._fd.closed:
                return
            try:
                unmap_all(self._fd, self.ioas_id)
            finally:
                self._fd.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd.closed else self.mode.value
        return f"<IommufdIoas at {id(self):#x}: {state}>"
