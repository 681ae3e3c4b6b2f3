# SPDX-License-Identifier: Apache-2.0
"""
Finds out, by doing it, whether this kernel's iommufd cuts mappings.

No device is needed: three pages of ours go into a scratch address space, the middle one is cut out,
and all of it is thrown away.
"""

from __future__ import annotations

import mmap

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.iommufd_calls import (
    alloc_ioas,
    destroy,
    disable_huge_pages,
    map_user,
    set_compat_ioas,
    unmap_all,
)
from ramblock.dma.target import HostRange
from ramblock.dma.vfio_dma import unmap_dma
from ramblock.errors import DmaError
from ramblock.hostmem.host_calls import address_of
from ramblock.units import PAGE_SIZE

__all__ = ["why_not_cutting"]

_IOVA = 1 << 30
_PAGES = 3


def why_not_cutting(fd: Descriptor) -> str | None:
    """
    Try a cut in an address space of its own.

    :return: None: it works. Else the obstacle.
    :raises DmaError: There is no address space to be had at all.
    """
    ioas = alloc_ioas(fd)
    try:
        with mmap.mmap(-1, _PAGES * PAGE_SIZE) as memory:
            return _try_cut(fd, ioas, HostRange(None, 0, address_of(memory), len(memory)))
    except DmaError as error:
        return error.strerror or str(error)
    finally:
        destroy(fd, ioas)


def _try_cut(fd: Descriptor, ioas: int, memory: HostRange) -> str | None:
    disable_huge_pages(fd, ioas)
    set_compat_ioas(fd, ioas)
    map_user(fd, ioas, _IOVA, memory, writable=True, detail="")
    removed = unmap_dma(fd, _IOVA + PAGE_SIZE, PAGE_SIZE)
    if removed != PAGE_SIZE:
        return f"cutting {PAGE_SIZE:#x} bytes out of a mapping removed {removed:#x}"
    rest = unmap_all(fd, ioas)
    if rest != (_PAGES - 1) * PAGE_SIZE:
        return f"{rest:#x} bytes were left of a mapping after a cut"
    return None
