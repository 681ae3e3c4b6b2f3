# SPDX-License-Identifier: Apache-2.0
"""
The calls of iommufd that we use, one function each (drivers/iommu/iommufd/ioas.c, io_pagetable.c).

An unmap that fails in part. It goes over the areas in the range, lowest first, and stops at the
first that is locked or in flux (EBUSY), sticks out of the range (ENOENT) or is held by a user in
the kernel (EDEADLK); those before it are gone, and the answer does not say how many
(iommufd_ioas_unmap()). A range of one page touches one area at most, so there a failure has done
nothing. In a larger one it is in doubt.
"""

from __future__ import annotations

import ctypes
import errno
from typing import NamedTuple

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.kernel_errors import KernelRefusal, Refused, refusal
from ramblock.dma.target import HostRange
from ramblock.uapi import ioctl
from ramblock.uapi.iommufd import (
    IOMMU_DESTROY,
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_IOVA_RANGES,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FILE,
    IOMMU_IOAS_UNMAP,
    IOMMU_OPTION,
    IOMMU_VFIO_IOAS,
    Destroy,
    IoasAlloc,
    IoasIovaRanges,
    IoasMap,
    IoasMapFile,
    IoasUnmap,
    IommuOption,
    IovaRange,
    MapFlags,
    Option,
    OptionOp,
    VfioIoas,
    VfioIoasOp,
)
from ramblock.units import PAGE_SIZE

__all__ = [
    "IovaWindow",
    "alloc_ioas",
    "destroy",
    "disable_huge_pages",
    "iova_window",
    "map_file",
    "map_user",
    "set_compat_ioas",
    "unmap",
    "unmap_all",
]

_READ_ONLY = (MapFlags.IOMMU_IOAS_MAP_FIXED_IOVA | MapFlags.IOMMU_IOAS_MAP_READABLE).value
_WRITABLE = (_READ_ONLY | MapFlags.IOMMU_IOAS_MAP_WRITEABLE).value
_MAP_SIZE = ctypes.sizeof(IoasMap)
_MAP_FILE_SIZE = ctypes.sizeof(IoasMapFile)
_UNMAP_SIZE = ctypes.sizeof(IoasUnmap)
_EVERYTHING = 0xFFFF_FFFF_FFFF_FFFF

# They are found out before the first area is touched.
_BEFORE_THE_FIRST_AREA = frozenset(
    {errno.EBADF, errno.ENOTTY, errno.E2BIG, errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EINVAL}
)
# They come with an area; the fate of those before it is not told.
_AT_AN_AREA = frozenset({errno.ENOENT, errno.EBUSY, errno.EDEADLK})


class IovaWindow(NamedTuple):
    """The answer of IOMMU_IOAS_IOVA_RANGES."""

    ranges: tuple[tuple[int, int], ...]
    """Usable addresses, half-open."""
    alignment: int
    """Of addresses and sizes, in bytes; 1 as long as no device is attached."""


def alloc_ioas(fd: Descriptor) -> int:
    """Make an I/O address space; returns its ID."""
    argument = IoasAlloc(size=ctypes.sizeof(IoasAlloc))
    fd.call("IOMMU_IOAS_ALLOC", IOMMU_IOAS_ALLOC, argument)
    return argument.out_ioas_id


def destroy(fd: Descriptor, ioas: int) -> None:
    """
    Remove an I/O address space with all that is mapped in it.

    EBUSY as long as a device is attached.
    """
    fd.call("IOMMU_DESTROY", IOMMU_DESTROY, Destroy(ctypes.sizeof(Destroy), ioas))


def disable_huge_pages(fd: Descriptor, ioas: int) -> None:
    """
    Put every page into the IOMMU's table by itself, so that mappings can be cut.

    EINVAL if some are there already.
    """
    argument = IommuOption(
        size=ctypes.sizeof(IommuOption),
        option_id=Option.IOMMU_OPTION_HUGE_PAGES,
        op=OptionOp.IOMMU_OPTION_OP_SET,
        object_id=ioas,
        val64=0,
    )
    fd.call("IOMMU_OPTION", IOMMU_OPTION, argument)


def set_compat_ioas(fd: Descriptor, ioas: int) -> None:
    """Let VFIO's calls on this iommufd mean *ioas*; there is one such IOAS per open iommufd."""
    argument = VfioIoas(
        size=ctypes.sizeof(VfioIoas), ioas_id=ioas, op=VfioIoasOp.IOMMU_VFIO_IOAS_SET
    )
    fd.call("IOMMU_VFIO_IOAS", IOMMU_VFIO_IOAS, argument)


def iova_window(fd: Descriptor, ioas: int) -> IovaWindow:
    """Ask which addresses can be mapped; the attached devices decide."""
    count = 16
    while True:
        found = (IovaRange * count)()
        argument = IoasIovaRanges(
            size=ctypes.sizeof(IoasIovaRanges),
            ioas_id=ioas,
            num_iovas=count,
            allowed_iovas=ctypes.addressof(found),
        )
        try:
            fd.call("IOMMU_IOAS_IOVA_RANGES", IOMMU_IOAS_IOVA_RANGES, argument)
        except KernelRefusal as error:
            if error.errno != errno.EMSGSIZE:
                raise
            count = argument.num_iovas
            continue
        ranges = tuple((entry.start, entry.last + 1) for entry in found[: argument.num_iovas])
        return IovaWindow(ranges, argument.out_iova_alignment)


def map_user(
    fd: Descriptor, ioas: int, iova: int, memory: HostRange, *, writable: bool, detail: str
) -> None:
    """
    IOMMU_IOAS_MAP: map the process's memory at ``memory.address``.

    :param detail: For the message where the kernel says EINVAL: which addresses are usable.
    :raises DmaError: The kernel refused; nothing has changed.
    """
    argument = IoasMap(
        _MAP_SIZE, _WRITABLE if writable else _READ_ONLY, ioas, 0, memory.address, memory.size, iova
    )
    _map(fd, "IOMMU_IOAS_MAP", IOMMU_IOAS_MAP, argument, detail)


def map_file(
    fd: Descriptor, ioas: int, iova: int, memory: HostRange, *, writable: bool, detail: str
) -> None:
    """
    IOMMU_IOAS_MAP_FILE: map a part of the memfd ``memory.fd``.

    :raises DmaError: ENOTTY: this kernel does not know the call. EINVAL: also where it is no memfd.
        Nothing has changed.
    """
    argument = IoasMapFile(
        _MAP_FILE_SIZE,
        _WRITABLE if writable else _READ_ONLY,
        ioas,
        memory.fd,
        memory.offset,
        memory.size,
        iova,
    )
    _map(fd, "IOMMU_IOAS_MAP_FILE", IOMMU_IOAS_MAP_FILE, argument, detail)


def _map(
    fd: Descriptor, name: str, request: int, argument: IoasMap | IoasMapFile, detail: str
) -> None:
    number = fd.fileno()
    try:
        ioctl.call(number, request, argument)
    except OSError as error:
        raise refusal(
            Refused(name, error.errno or 0, argument.iova, argument.length),
            detail=detail if error.errno == errno.EINVAL else None,
        ) from None


def unmap(fd: Descriptor, ioas: int, iova: int, size: int, *, smallest: int = PAGE_SIZE) -> int:
    """
    IOMMU_IOAS_UNMAP: unmap the whole areas of ``[iova, iova + size)``.

    :param smallest: The smallest size of an area, in bytes.
    :return: Bytes removed.
    :raises DmaError: ENOENT: nothing is mapped there, or an area sticks out. In doubt if there was
        room for several areas: those before the one that failed may be gone.
    """
    number = fd.fileno()
    argument = IoasUnmap(_UNMAP_SIZE, ioas, iova, size)
    try:
        ioctl.call(number, IOMMU_IOAS_UNMAP, argument)
    except OSError as error:
        code = error.errno or 0
        undone = code in _BEFORE_THE_FIRST_AREA or (size <= smallest and code in _AT_AN_AREA)
        raise refusal(
            Refused("IOMMU_IOAS_UNMAP", code, iova, size),
            detail=None if undone else "mappings before that one may be gone",
            in_doubt=not undone,
        ) from None
    return argument.length


def unmap_all(fd: Descriptor, ioas: int) -> int:
    """
    IOMMU_IOAS_UNMAP of everything; succeeds with 0 where nothing is mapped.

    Raises as :func:`unmap`.
    """
    return unmap(fd, ioas, 0, _EVERYTHING)
