# SPDX-License-Identifier: Apache-2.0
"""
Mapping and unmapping by VFIO's own calls: a type1 container, or an iommufd in compat mode.

The answer tells the rest of an unmap that failed. A type1 container checks both ends first and
removes nothing (drivers/vfio/vfio_iommu_type1.c, vfio_dma_do_unmap()); it does not touch the
argument then, so ``size`` is that of the request. iommufd may fail between two mappings, and writes
back the bytes removed (drivers/iommu/iommufd/vfio_compat.c, iommufd_vfio_unmap_dma()); if already
the cut failed it does not touch the argument either.
"""

from __future__ import annotations

import ctypes
import errno

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.kernel_errors import Refused, refusal
from ramblock.uapi import ioctl
from ramblock.uapi.vfio import (
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_UNMAP_DMA,
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    DmaUnmapFlags,
)
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE

__all__ = ["check_pages", "map_dma", "unmap_all_dma", "unmap_dma"]

_READ = DmaMapFlags.VFIO_DMA_MAP_FLAG_READ.value
_WRITE = DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE.value
_ALL = DmaUnmapFlags.VFIO_DMA_UNMAP_FLAG_ALL.value
_MAP_SIZE = ctypes.sizeof(DmaMap)
_UNMAP_SIZE = ctypes.sizeof(DmaUnmap)


def check_pages(call: str, iova: int, size: int) -> None:
    """
    Refuse a range that is not of whole pages below 2**64.

    Before the kernel sees it: a field of 64 bits would take the low ones of a larger number without
    a word, and iommufd maps any bytes as long as no device is attached that wants pages.

    :raises DmaError: EINVAL; nothing has changed.
    """
    if size <= 0 or iova < 0 or iova + size > ADDRESS_LIMIT or (iova | size) & (PAGE_SIZE - 1):
        raise refusal(
            Refused(call, errno.EINVAL, iova, size), detail="not made of whole pages below 2**64"
        )


def map_dma(
    fd: Descriptor, iova: int, address: int, size: int, *, writable: bool, detail: str
) -> None:
    """
    Map ``[iova, iova + size)`` to the host memory at *address*.

    :param detail: For the message where the kernel says EINVAL: which addresses are usable.
    :raises DmaError: The kernel refused; nothing has changed.
    """
    number = fd.fileno()
    argument = DmaMap(_MAP_SIZE, _READ | _WRITE if writable else _READ, address, iova, size)
    try:
        ioctl.call(number, VFIO_IOMMU_MAP_DMA, argument)
    except OSError as error:
        raise refusal(
            Refused("VFIO_IOMMU_MAP_DMA", error.errno or 0, iova, size),
            detail=detail if error.errno == errno.EINVAL else None,
        ) from None


def unmap_dma(fd: Descriptor, iova: int, size: int) -> int:
    """
    Unmap ``[iova, iova + size)``.

    :return: Bytes removed; 0 where nothing was mapped.
    :raises DmaError: The kernel refused. Nothing has changed, unless it is ``in_doubt``.
    """
    return _unmap(fd, DmaUnmap(_UNMAP_SIZE, 0, iova, size))


def unmap_all_dma(fd: Descriptor) -> int:
    """
    Unmap everything (VFIO_UNMAP_ALL, Linux 5.12).

    :return: Bytes removed.
    :raises DmaError: The kernel refused.
    """
    return _unmap(fd, DmaUnmap(_UNMAP_SIZE, _ALL, 0, 0))


def _unmap(fd: Descriptor, argument: DmaUnmap) -> int:
    number = fd.fileno()
    size = argument.size
    try:
        ioctl.call(number, VFIO_IOMMU_UNMAP_DMA, argument)
    except OSError as error:
        removed = argument.size
        # Writing the answer back fails with EFAULT: the work may be done.
        in_doubt = error.errno == errno.EFAULT or removed not in (0, size)
        raise refusal(
            Refused("VFIO_IOMMU_UNMAP_DMA", error.errno or 0, argument.iova, size),
            detail=f"{removed:#x} bytes of it are gone" if in_doubt else None,
            in_doubt=in_doubt,
        ) from None
    return argument.size
