# SPDX-License-Identifier: Apache-2.0
"""
A VFIO type1 container as a DMA target (drivers/vfio/vfio_iommu_type1.c).

It cannot cut: an unmap that would bisect a mapping is EINVAL and removes nothing. And it counts:
each mapping takes one of ``dma_entry_limit`` entries (65,535 unless the module was told otherwise),
so that one mapping per page ends at 256 MiB. The container keeps the limit that it found when its
first group came.
"""

from __future__ import annotations

import ctypes
import errno
from contextlib import suppress
from threading import Lock
from typing import NamedTuple

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.info_chain import ask_with_chain, read_array, read_structure, walk_chain
from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.dma.vfio_dma import check_pages, map_dma, unmap_all_dma, unmap_dma
from ramblock.dma.vfio_group import VfioGroup
from ramblock.errors import DmaError, UsageError, describe_range
from ramblock.process import OfOneProcess
from ramblock.uapi.vfio import (
    VFIO_API_VERSION,
    VFIO_CHECK_EXTENSION,
    VFIO_GET_API_VERSION,
    VFIO_IOMMU_GET_INFO,
    VFIO_SET_IOMMU,
    DmaAvailCapability,
    Extension,
    IovaRange,
    IovaRangeCapability,
    Type1Capability,
    Type1Info,
    Type1InfoFlags,
)
from ramblock.units import PAGE_SIZE

__all__ = ["Type1Container", "Type1Limits", "parse_type1_info"]

# The limit of a kernel without VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL; QEMU assumes the same
# (hw/vfio/container-legacy.c).
_DEFAULT_ENTRIES = 65535
# iommufd behind /dev/vfio/vfio has no limit and says U32_MAX (drivers/iommu/iommufd/vfio_compat.c).
_NO_LIMIT = 0xFFFF_FFFF


class Type1Limits(NamedTuple):
    """The answer of VFIO_IOMMU_GET_INFO."""

    page_size: int
    """The smallest page of the IOMMU, in bytes."""
    iova_ranges: tuple[tuple[int, int], ...] | None
    """Usable addresses, half-open; None where the kernel does not tell."""
    available: int | None
    """Mappings that may still be made; None where there is no limit."""


def parse_type1_info(answer: bytes) -> Type1Limits:
    """
    Read the answer of VFIO_IOMMU_GET_INFO.

    :raises DmaError: EPROTO: it contradicts itself.
    """
    info = read_structure(answer, 0, Type1Info)
    page_size = PAGE_SIZE
    if info.flags & Type1InfoFlags.VFIO_IOMMU_INFO_PGSIZES and info.iova_pgsizes:
        page_size = info.iova_pgsizes & -info.iova_pgsizes
    ranges: tuple[tuple[int, int], ...] | None = None
    available = _DEFAULT_ENTRIES
    has_chain = info.flags & Type1InfoFlags.VFIO_IOMMU_INFO_CAPS
    for capability in walk_chain(answer, info.cap_offset if has_chain else 0):
        if capability.id == Type1Capability.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            ranges = _parse_ranges(answer, capability.offset)
        elif capability.id == Type1Capability.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
            available = read_structure(answer, capability.offset, DmaAvailCapability).avail
    return Type1Limits(page_size, ranges, None if available == _NO_LIMIT else available)


def _parse_ranges(answer: bytes, offset: int) -> tuple[tuple[int, int], ...]:
    head = read_structure(answer, offset, IovaRangeCapability)
    first = offset + ctypes.sizeof(IovaRangeCapability)
    found = read_array(answer, first, IovaRange, head.nr_iovas)
    for entry in found:
        if entry.end < entry.start:
            raise DmaError(
                errno.EPROTO, f"IOVA range from {entry.start:#x} to {entry.end:#x} is empty"
            )
    return tuple((entry.start, entry.end + 1) for entry in found)


class Type1Container(OfOneProcess):
    """
    A container, and the groups in it. Maps for all of their devices at once.

    It owns the groups: they stay in it until it is closed, even without their devices, so that
    mappings stay.

    :param path: The container's device file.
    :raises DmaError: There is none, it may not be opened, or it has no type1 v2 IOMMU. Nothing is
        held.
    """

    def __init__(self, *, path: str = "/dev/vfio/vfio") -> None:
        self._fd = Descriptor.open(path, "/dev/vfio/vfio")
        self._lock = Lock()
        self._groups: dict[int, VfioGroup] = {}
        self._capabilities: DmaCapabilities | None = None
        self._usable = ""
        try:
            self._check()
        except BaseException:
            self._fd.close()
            raise

    def _check(self) -> None:
        version = self._fd.call("VFIO_GET_API_VERSION", VFIO_GET_API_VERSION)
        if version != VFIO_API_VERSION:
            raise DmaError(
                errno.EPROTO, f"{self._fd.name} speaks version {version}, not {VFIO_API_VERSION}"
            )
        for extension in (Extension.VFIO_TYPE1v2_IOMMU, Extension.VFIO_UNMAP_ALL):
            if not self._fd.call("VFIO_CHECK_EXTENSION", VFIO_CHECK_EXTENSION, extension.value):
                raise DmaError(
                    errno.ENODEV, f"{self._fd.name} does not know {extension.name}; "
                    "the module vfio_iommu_type1 of Linux 5.12 or newer does"
                )  # fmt: skip

    # -- groups ------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[VfioGroup]:
        """The groups that are in it."""
        return list(self._groups.values())

    def fileno(self) -> int:
        """
        Tell the descriptor.

        :raises DmaError: EBADF: it is closed.
        """
        return self._fd.fileno()

    def group(self, number: int) -> VfioGroup | None:
        """Look up a group that is in it."""
        return self._groups.get(number)

    def add_group(self, group: VfioGroup) -> None:
        """
        Take *group* in; from now on the container closes it.

        The first one brings the IOMMU, and the limit on mappings.

        :raises UsageError: A group of that number is in it already.
        :raises DmaError: The kernel refused. *group* is the caller's as before, and in no
            container.
        """
        with self._lock:
            if group.number in self._groups:
                raise UsageError(f"{group!r} is in the container already", value=group)
            group.set_container(self._fd)
            try:
                if not self._groups:
                    self._fd.call(
                        "VFIO_SET_IOMMU", VFIO_SET_IOMMU, Extension.VFIO_TYPE1v2_IOMMU.value,
                        group=group.number,
                    )  # fmt: skip
                self._refresh()
                self._groups[group.number] = group
            except BaseException:
                if not self._groups:
                    self._capabilities = None
                # The first failure counts; closing the group takes it out as well.
                with suppress(DmaError):
                    group.unset_container()
                raise

    def _refresh(self) -> None:
        limits = self._ask()
        before = self._capabilities
        # The limit is the number available when nothing was mapped.
        limit = limits.available if before is None else before.max_mappings
        self._capabilities = DmaCapabilities(
            page_size=limits.page_size, max_mappings=limit, iova_ranges=limits.iova_ranges
        )
        self._usable = "usable: " + (
            "not told by this kernel"
            if limits.iova_ranges is None
            else ", ".join(describe_range(start, end - start) for start, end in limits.iova_ranges)
        )

    def _ask(self) -> Type1Limits:
        return parse_type1_info(
            ask_with_chain(
                Type1Info,
                lambda buffer: self._fd.call("VFIO_IOMMU_GET_INFO", VFIO_IOMMU_GET_INFO, buffer),
            )
        )

    # -- the target --------------------------------------------------------------------------------

    @property
    def capabilities(self) -> DmaCapabilities:
        """
        Its abilities; ``max_mappings`` is the container's whole limit.

        :raises UsageError: No group is in it, so that it has no IOMMU yet.
        """
        if self._capabilities is None:
            raise UsageError(
                "the container has no IOMMU before a group is in it", expected="add_group() first"
            )
        return self._capabilities

    @property
    def available(self) -> int | None:
        """
        How many mappings may still be made, asked now; None: any number.

        :raises DmaError: The container is closed, or has no group.
        """
        with self._lock:
            return self._ask().available

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """
        Let devices reach *memory* at *iova*; it is pinned, and charged to RLIMIT_MEMLOCK.

        :raises DmaError: The kernel refused (:data:`~ramblock.dma.kernel_errors.TABLE`); nothing
            has changed.
        """
        check_pages("map", iova, memory.size)
        with self._lock:
            map_dma(
                self._fd, iova, memory.address, memory.size, writable=writable, detail=self._usable
            )

    def unmap(self, iova: int, size: int) -> int:
        """
        Take ``[iova, iova + size)`` away from devices.

        :return: Bytes really unmapped; 0 where nothing was mapped.
        :raises DmaError: EINVAL: it would cut a mapping. Nothing has changed.
        """
        check_pages("unmap", iova, size)
        with self._lock:
            return unmap_dma(self._fd, iova, size)

    def close(self) -> None:
        """
        Unmap everything and close the groups. A device that is still open reaches nothing any more.

        :raises DmaError: The kernel did not unmap; open devices may still reach the range until
            they are closed.
        """
        with self._lock:
            if self._fd.closed:
                return
            try:
                if self._groups:
                    unmap_all_dma(self._fd)
            finally:
                for group in self._groups.values():
                    group.close()
                self._fd.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd.closed else f"groups {sorted(self._groups)}"
        return f"<Type1Container at {id(self):#x}: {state}>"
