# SPDX-License-Identifier: Apache-2.0
"""VFIO: containers, groups, devices and the type1 IOMMU (include/uapi/linux/vfio.h)."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import Final

from ramblock.uapi.ioctl import io

HEADER = "linux/vfio.h"

VFIO_API_VERSION: Final = 0
VFIO_TYPE: Final = ord(";")
VFIO_BASE: Final = 100


class Extension(IntEnum):
    """Arguments of VFIO_CHECK_EXTENSION."""

    VFIO_TYPE1v2_IOMMU = 3
    VFIO_UNMAP_ALL = 9


class GroupFlags(IntFlag):
    """``vfio_group_status.flags``."""

    VFIO_GROUP_FLAGS_VIABLE = 1 << 0
    VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1


class DeviceFlags(IntFlag):
    """``vfio_device_info.flags``."""

    VFIO_DEVICE_FLAGS_RESET = 1 << 0
    VFIO_DEVICE_FLAGS_PCI = 1 << 1


class RegionFlags(IntFlag):
    """``vfio_region_info.flags``."""

    VFIO_REGION_INFO_FLAG_READ = 1 << 0
    VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
    VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
    VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


class PciRegion(IntEnum):
    """Region indices of a PCI device."""

    VFIO_PCI_BAR0_REGION_INDEX = 0
    VFIO_PCI_BAR1_REGION_INDEX = 1
    VFIO_PCI_BAR2_REGION_INDEX = 2
    VFIO_PCI_BAR3_REGION_INDEX = 3
    VFIO_PCI_BAR4_REGION_INDEX = 4
    VFIO_PCI_BAR5_REGION_INDEX = 5
    VFIO_PCI_ROM_REGION_INDEX = 6
    VFIO_PCI_CONFIG_REGION_INDEX = 7


class Type1InfoFlags(IntFlag):
    """``vfio_iommu_type1_info.flags``."""

    VFIO_IOMMU_INFO_PGSIZES = 1 << 0
    VFIO_IOMMU_INFO_CAPS = 1 << 1


class Type1Capability(IntEnum):
    """Capabilities in the chain behind ``vfio_iommu_type1_info``."""

    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3


class DmaMapFlags(IntFlag):
    """``vfio_iommu_type1_dma_map.flags``; read and write as the device sees it."""

    VFIO_DMA_MAP_FLAG_READ = 1 << 0
    VFIO_DMA_MAP_FLAG_WRITE = 1 << 1


class DmaUnmapFlags(IntFlag):
    """``vfio_iommu_type1_dma_unmap.flags``."""

    VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1


#: In the chain behind ``vfio_region_info``.
VFIO_REGION_INFO_CAP_SPARSE_MMAP: Final = 1


class CapabilityHeader(ctypes.Structure):
    """
    Begins each entry of a capability chain.

    ``next`` is an offset from the start of the answer, 0 ends the chain.
    """

    C_NAME = "struct vfio_info_cap_header"
    id: int
    version: int
    next: int
    _fields_ = (("id", ctypes.c_uint16), ("version", ctypes.c_uint16), ("next", ctypes.c_uint32))


class GroupStatus(ctypes.Structure):
    """VFIO_GROUP_GET_STATUS."""

    C_NAME = "struct vfio_group_status"
    argsz: int
    flags: int
    _fields_ = (("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class DeviceInfo(ctypes.Structure):
    """VFIO_DEVICE_GET_INFO."""

    C_NAME = "struct vfio_device_info"
    argsz: int
    flags: int
    num_regions: int
    num_irqs: int
    cap_offset: int
    pad: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("num_regions", ctypes.c_uint32),
        ("num_irqs", ctypes.c_uint32),
        ("cap_offset", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class RegionInfo(ctypes.Structure):
    """VFIO_DEVICE_GET_REGION_INFO."""

    C_NAME = "struct vfio_region_info"
    argsz: int
    flags: int
    index: int
    cap_offset: int
    size: int
    offset: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("cap_offset", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


class SparseMmapArea(ctypes.Structure):
    """A part of a region that may be mapped into the process, relative to the region."""

    C_NAME = "struct vfio_region_sparse_mmap_area"
    offset: int
    size: int
    _fields_ = (("offset", ctypes.c_uint64), ("size", ctypes.c_uint64))


class SparseMmapCapability(ctypes.Structure):
    """The head of VFIO_REGION_INFO_CAP_SPARSE_MMAP; ``nr_areas`` areas follow."""

    C_NAME = "struct vfio_region_info_cap_sparse_mmap"
    header: CapabilityHeader
    nr_areas: int
    reserved: int
    _fields_ = (
        ("header", CapabilityHeader),
        ("nr_areas", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class DeviceBindIommufd(ctypes.Structure):
    """VFIO_DEVICE_BIND_IOMMUFD."""

    C_NAME = "struct vfio_device_bind_iommufd"
    argsz: int
    flags: int
    iommufd: int
    out_devid: int
    token_uuid_ptr: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iommufd", ctypes.c_int32),
        ("out_devid", ctypes.c_uint32),
        ("token_uuid_ptr", ctypes.c_uint64),
    )


class DeviceAttachIommufd(ctypes.Structure):
    """VFIO_DEVICE_ATTACH_IOMMUFD_PT; ``pt_id`` may be an IOAS."""

    C_NAME = "struct vfio_device_attach_iommufd_pt"
    argsz: int
    flags: int
    pt_id: int
    pasid: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pt_id", ctypes.c_uint32),
        ("pasid", ctypes.c_uint32),
    )


class DeviceDetachIommufd(ctypes.Structure):
    """VFIO_DEVICE_DETACH_IOMMUFD_PT."""

    C_NAME = "struct vfio_device_detach_iommufd_pt"
    argsz: int
    flags: int
    pasid: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pasid", ctypes.c_uint32),
    )


class Type1Info(ctypes.Structure):
    """VFIO_IOMMU_GET_INFO; a capability chain may follow at ``cap_offset``."""

    C_NAME = "struct vfio_iommu_type1_info"
    argsz: int
    flags: int
    iova_pgsizes: int
    cap_offset: int
    pad: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iova_pgsizes", ctypes.c_uint64),
        ("cap_offset", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class IovaRange(ctypes.Structure):
    """A range of usable IOVAs; ``end`` is the last address, inclusive."""

    C_NAME = "struct vfio_iova_range"
    start: int
    end: int
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64))


class IovaRangeCapability(ctypes.Structure):
    """The head of VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE; ``nr_iovas`` ranges follow."""

    C_NAME = "struct vfio_iommu_type1_info_cap_iova_range"
    header: CapabilityHeader
    nr_iovas: int
    reserved: int
    _fields_ = (
        ("header", CapabilityHeader),
        ("nr_iovas", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class DmaAvailCapability(ctypes.Structure):
    """VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: how many mappings more may exist."""

    C_NAME = "struct vfio_iommu_type1_info_dma_avail"
    header: CapabilityHeader
    avail: int
    _fields_ = (("header", CapabilityHeader), ("avail", ctypes.c_uint32))


class DmaMap(ctypes.Structure):
    """VFIO_IOMMU_MAP_DMA."""

    C_NAME = "struct vfio_iommu_type1_dma_map"
    argsz: int
    flags: int
    vaddr: int
    iova: int
    size: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("vaddr", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


class DmaUnmap(ctypes.Structure):
    """VFIO_IOMMU_UNMAP_DMA; the kernel answers in ``size`` how many bytes it removed."""

    C_NAME = "struct vfio_iommu_type1_dma_unmap"
    argsz: int
    flags: int
    iova: int
    size: int
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


# All of them are _IO(): the size of the argument is in its first field, so that structures can
# grow.
VFIO_GET_API_VERSION = io(VFIO_TYPE, VFIO_BASE + 0)
VFIO_CHECK_EXTENSION = io(VFIO_TYPE, VFIO_BASE + 1)
VFIO_SET_IOMMU = io(VFIO_TYPE, VFIO_BASE + 2)
VFIO_GROUP_GET_STATUS = io(VFIO_TYPE, VFIO_BASE + 3)
VFIO_GROUP_SET_CONTAINER = io(VFIO_TYPE, VFIO_BASE + 4)
VFIO_GROUP_UNSET_CONTAINER = io(VFIO_TYPE, VFIO_BASE + 5)
VFIO_GROUP_GET_DEVICE_FD = io(VFIO_TYPE, VFIO_BASE + 6)
VFIO_DEVICE_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 7)
VFIO_DEVICE_GET_REGION_INFO = io(VFIO_TYPE, VFIO_BASE + 8)
VFIO_DEVICE_RESET = io(VFIO_TYPE, VFIO_BASE + 11)
VFIO_IOMMU_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 12)
VFIO_IOMMU_MAP_DMA = io(VFIO_TYPE, VFIO_BASE + 13)
VFIO_IOMMU_UNMAP_DMA = io(VFIO_TYPE, VFIO_BASE + 14)
VFIO_DEVICE_BIND_IOMMUFD = io(VFIO_TYPE, VFIO_BASE + 18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 19)
VFIO_DEVICE_DETACH_IOMMUFD_PT = io(VFIO_TYPE, VFIO_BASE + 20)
