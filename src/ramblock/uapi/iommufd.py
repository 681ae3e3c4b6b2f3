# SPDX-License-Identifier: Apache-2.0
"""
iommufd: I/O address spaces and their mappings (include/uapi/linux/iommufd.h).

Errno has one meaning for all of its calls: ENOTTY, the call is not known; E2BIG, the structure is
longer than known and the rest is not 0; EOPNOTSUPP, a known field has an unknown value; ENOENT, no
such object or IOVA.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import ClassVar, Final

from ramblock.uapi.ioctl import io

HEADER = "linux/iommufd.h"

IOMMUFD_TYPE: Final = ord(";")


class Command(IntEnum):
    """Numbers of the calls."""

    IOMMUFD_CMD_DESTROY = 0x80
    IOMMUFD_CMD_IOAS_ALLOC = 0x81
    IOMMUFD_CMD_IOAS_IOVA_RANGES = 0x84
    IOMMUFD_CMD_IOAS_MAP = 0x85
    IOMMUFD_CMD_IOAS_UNMAP = 0x86
    IOMMUFD_CMD_OPTION = 0x87
    IOMMUFD_CMD_VFIO_IOAS = 0x88
    IOMMUFD_CMD_IOAS_MAP_FILE = 0x8F


class MapFlags(IntFlag):
    """``iommu_ioas_map.flags``; readable and writeable as the device sees it."""

    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
    IOMMU_IOAS_MAP_READABLE = 1 << 2


class Option(IntEnum):
    """``iommu_option.option_id``."""

    IOMMU_OPTION_HUGE_PAGES = 1


class OptionOp(IntEnum):
    """``iommu_option.op``."""

    IOMMU_OPTION_OP_SET = 0
    IOMMU_OPTION_OP_GET = 1


class VfioIoasOp(IntEnum):
    """``iommu_vfio_ioas.op``."""

    IOMMU_VFIO_IOAS_SET = 1


class Destroy(ctypes.Structure):
    """IOMMU_DESTROY."""

    C_NAME = "struct iommu_destroy"
    size: int
    id: int
    _fields_ = (("size", ctypes.c_uint32), ("id", ctypes.c_uint32))


class IoasAlloc(ctypes.Structure):
    """IOMMU_IOAS_ALLOC."""

    C_NAME = "struct iommu_ioas_alloc"
    size: int
    flags: int
    out_ioas_id: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("out_ioas_id", ctypes.c_uint32),
    )


class IovaRange(ctypes.Structure):
    """A range of usable IOVAs; ``last`` is inclusive."""

    C_NAME = "struct iommu_iova_range"
    start: int
    last: int
    _fields_ = (("start", ctypes.c_uint64), ("last", ctypes.c_uint64))


class IoasIovaRanges(ctypes.Structure):
    """
    IOMMU_IOAS_IOVA_RANGES.

    EMSGSIZE with the right ``num_iovas`` where the array is too small.
    """

    C_NAME = "struct iommu_ioas_iova_ranges"
    C_FIELDS: ClassVar = {"reserved": "__reserved"}
    size: int
    ioas_id: int
    num_iovas: int
    reserved: int
    allowed_iovas: int
    out_iova_alignment: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("num_iovas", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("allowed_iovas", ctypes.c_uint64),
        ("out_iova_alignment", ctypes.c_uint64),
    )


class IoasMap(ctypes.Structure):
    """IOMMU_IOAS_MAP."""

    C_NAME = "struct iommu_ioas_map"
    C_FIELDS: ClassVar = {"reserved": "__reserved"}
    size: int
    flags: int
    ioas_id: int
    reserved: int
    user_va: int
    length: int
    iova: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("user_va", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
    )


class IoasMapFile(ctypes.Structure):
    """IOMMU_IOAS_MAP_FILE."""

    C_NAME = "struct iommu_ioas_map_file"
    size: int
    flags: int
    ioas_id: int
    fd: int
    start: int
    length: int
    iova: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
    )


class IoasUnmap(ctypes.Structure):
    """IOMMU_IOAS_UNMAP; the kernel answers in ``length`` how many bytes it removed."""

    C_NAME = "struct iommu_ioas_unmap"
    size: int
    ioas_id: int
    iova: int
    length: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


class IommuOption(ctypes.Structure):
    """IOMMU_OPTION."""

    C_NAME = "struct iommu_option"
    C_FIELDS: ClassVar = {"reserved": "__reserved"}
    size: int
    option_id: int
    op: int
    reserved: int
    object_id: int
    val64: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("option_id", ctypes.c_uint32),
        ("op", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
        ("object_id", ctypes.c_uint32),
        ("val64", ctypes.c_uint64),
    )


class VfioIoas(ctypes.Structure):
    """IOMMU_VFIO_IOAS: which IOAS the VFIO calls on an iommufd mean."""

    C_NAME = "struct iommu_vfio_ioas"
    C_FIELDS: ClassVar = {"reserved": "__reserved"}
    size: int
    ioas_id: int
    op: int
    reserved: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("op", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
    )


IOMMU_DESTROY = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_DESTROY)
IOMMU_IOAS_ALLOC = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_IOAS_ALLOC)
IOMMU_IOAS_IOVA_RANGES = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_IOAS_IOVA_RANGES)
IOMMU_IOAS_MAP = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_IOAS_MAP)
IOMMU_IOAS_MAP_FILE = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_IOAS_MAP_FILE)
IOMMU_IOAS_UNMAP = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_IOAS_UNMAP)
IOMMU_OPTION = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_OPTION)
IOMMU_VFIO_IOAS = io(IOMMUFD_TYPE, Command.IOMMUFD_CMD_VFIO_IOAS)
