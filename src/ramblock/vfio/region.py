# SPDX-License-Identifier: Apache-2.0
"""Regions of a VFIO device: BARs and config space, by read and write, or mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.info_chain import ask_with_chain, read_array, read_structure, walk_chain
from ramblock.errors import DmaError, UsageError, describe_range
from ramblock.uapi.vfio import (
    VFIO_DEVICE_GET_REGION_INFO,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    RegionFlags,
    RegionInfo,
    SparseMmapArea,
    SparseMmapCapability,
)
from ramblock.units import check_range

__all__ = ["MappedRegion", "Region", "RegionLayout", "parse_region_info"]


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """The answer of VFIO_DEVICE_GET_REGION_INFO."""

    index: int
    size: int
    """In bytes; 0: the device has no such region."""
    offset: int
    """Where it begins in the device's descriptor."""
    flags: RegionFlags
    mappable: tuple[tuple[int, int], ...]
    """The parts that may be mapped into the process, as (start, end) in the region."""


def parse_region_info(answer: bytes) -> RegionLayout:
    """
    Read the answer of VFIO_DEVICE_GET_REGION_INFO.

    :raises DmaError: EPROTO: it contradicts itself.
    """
    info = read_structure(answer, 0, RegionInfo)
    flags = RegionFlags(info.flags)
    mappable: tuple[tuple[int, int], ...] = ()
    if RegionFlags.VFIO_REGION_INFO_FLAG_MMAP in flags:
        mappable = ((0, info.size),)
    has_chain = RegionFlags.VFIO_REGION_INFO_FLAG_CAPS in flags
    for capability in walk_chain(answer, info.cap_offset if has_chain else 0):
        if capability.id == VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            head = read_structure(answer, capability.offset, SparseMmapCapability)
            first = capability.offset + ctypes.sizeof(SparseMmapCapability)
            areas = read_array(answer, first, SparseMmapArea, head.nr_areas)
            mappable = tuple((area.offset, area.offset + area.size) for area in areas)
    return RegionLayout(info.index, info.size, info.offset, flags, mappable)


class Region:
    """
    One region of an open device.

    :param fd: The device's descriptor.
    :param index: Which region.
    :raises DmaError: The device is closed, or has no region of that index.
    """

    def __init__(self, fd: Descriptor, index: int) -> None:
        self._fd = fd

        def ask(buffer: ctypes.Array[ctypes.c_char]) -> None:
            RegionInfo.from_buffer(buffer).index = index
            fd.call("VFIO_DEVICE_GET_REGION_INFO", VFIO_DEVICE_GET_REGION_INFO, buffer)

        self.layout = parse_region_info(ask_with_chain(RegionInfo, ask))

    @property
    def size(self) -> int:
        """In bytes."""
        return self.layout.size

    def read(self, offset: int, size: int) -> bytes:
        """
        Read bytes.

        :raises UsageError: Outside the region.
        :raises DmaError: The device is closed.
        :raises OSError: The device did not answer; EIO where its memory is switched off.
        """
        self._check(offset, size, "read")
        data = os.pread(self._fd.fileno(), size, self.layout.offset + offset)
        if len(data) != size:
            raise OSError(
                f"region {self.layout.index}: {len(data)} bytes of {describe_range(offset, size)}"
                " read"
            )
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; raises as :meth:`read`, and some of them may be written then."""
        self._check(offset, len(data), "write")
        done = os.pwrite(self._fd.fileno(), data, self.layout.offset + offset)
        if done != len(data):
            raise OSError(
                f"region {self.layout.index}: {done} bytes of {describe_range(offset, len(data))}"
                " written"
            )

    def _check(self, offset: int, size: int, what: str) -> None:
        check_range(
            offset, size, limit=self.layout.size, align=1,
            what=f"{what} of region {self.layout.index}",
        )  # fmt: skip


class MappedRegion:
    """
    A region in the process's address space.

    An access is one load or store of its width, as registers need it.

    It keeps the device open until it is closed. Made by ``VfioDevice.map_region``.

    :raises UsageError: The kernel lets only parts of it be mapped, or nothing.
    :raises DmaError: It cannot be mapped.
    """

    def __init__(self, fd: Descriptor, layout: RegionLayout) -> None:
        if layout.mappable != ((0, layout.size),):
            raise UsageError(
                f"region {layout.index} cannot be mapped as a whole", value=layout.mappable
            )
        try:
            self._mapping = mmap.mmap(fd.fileno(), layout.size, offset=layout.offset)
        except OSError as error:
            raise DmaError(
                error.errno or 0, f"mmap of region {layout.index}: {error.strerror}"
            ) from error
        view = memoryview(self._mapping)
        self._views = (view.cast("I"), view.cast("Q"), view)
        #: As 32-bit registers: element *i* is at byte ``4 * i``. In loops that a method call would
        #: slow down.
        self.words = self._views[0]

    def read32(self, offset: int) -> int:
        """Read a 32-bit register; *offset* in bytes, a multiple of 4."""
        return self._views[0][offset >> 2]

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self._views[0][offset >> 2] = value

    def read64(self, offset: int) -> int:
        """Read a 64-bit register; *offset* in bytes, a multiple of 8."""
        return self._views[1][offset >> 3]

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register."""
        self._views[1][offset >> 3] = value

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._mapping.closed

    def close(self) -> None:
        """Unmap it; an access afterwards is a ValueError. Nothing happens the second time."""
        for view in self._views:
            view.release()
        self._mapping.close()
