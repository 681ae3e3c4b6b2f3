# SPDX-License-Identifier: Apache-2.0
"""
Numbers of the vfio-user protocol (QEMU's docs/interop/vfio-user.rst).

The numbers shared with VFIO's ioctls (region and device flags, region indices) are in
:mod:`ramblock.uapi.vfio`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from ramblock.units import KIB, MIB

__all__ = [
    "DEFAULT_MAX_DATA_XFER_SIZE",
    "DEFAULT_MAX_DMA_MAPS",
    "DEFAULT_MAX_MSG_FDS",
    "DEFAULT_PGSIZES",
    "ERRNO_LIMIT",
    "FROM_SERVER",
    "HEADER_SIZE",
    "KERNEL_MAX_FDS",
    "MAX_MULTI_DATA",
    "MAX_MULTI_WRITES",
    "MAX_VERSION_DATA",
    "PROTOCOL_MAJOR",
    "PROTOCOL_MINOR",
    "Command",
    "DmaFlags",
    "DmaUnmapFlags",
    "HeaderFlags",
    "IrqInfoFlags",
    "IrqSetFlags",
    "command_name",
]

#: The version that we speak. QEMU's client accepts no other answer than 0.0.
PROTOCOL_MAJOR = 0
PROTOCOL_MINOR = 0


class Command(IntEnum):
    """The command of a message; the specification writes VFIO_USER_ before each."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    # Known by name, and not served.
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


def command_name(command: int) -> str:
    """Tell the name of a command, or its number where it has none here."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


#: Commands that the server sends and the client answers; all others go the other way.
FROM_SERVER = frozenset({Command.DMA_READ, Command.DMA_WRITE})


class HeaderFlags(IntFlag):
    """The header's flags; the low four bits are the type, of which two values exist."""

    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20


class DmaFlags(IntFlag):
    """
    ``flags`` of DMA_MAP: the server's rights there, and its way.

    The last two came to libvfio-user in June 2026 (include/vfio-user.h, VFIO_USER_F_DMA_REGION_*).
    They need a descriptor, and exclude each other (lib/libvfio-user.c, handle_dma_map()).
    """

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    FILE_IO = 1 << 3


class DmaUnmapFlags(IntFlag):
    """
    ``flags`` of DMA_UNMAP: none in the specification.

    VFIO's, as QEMU and libvfio-user send and know them.
    """

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class IrqInfoFlags(IntFlag):
    """``vfio_irq_info.flags`` (include/uapi/linux/vfio.h, VFIO_IRQ_INFO_*)."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlags(IntFlag):
    """``vfio_irq_set.flags`` (linux/vfio.h, VFIO_IRQ_SET_*): one of DATA, one of ACTION."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


HEADER_SIZE = 16

# Defaults where a VERSION message does not say otherwise.
DEFAULT_MAX_MSG_FDS = 1
DEFAULT_MAX_DATA_XFER_SIZE = MIB
DEFAULT_MAX_DMA_MAPS = 65535
DEFAULT_PGSIZES = 4 * KIB

#: Longest JSON of a VERSION message; that of peers has some 200 bytes.
MAX_VERSION_DATA = 16 * KIB
#: Bytes that one write of REGION_WRITE_MULTI carries at most: its field has that size.
MAX_MULTI_DATA = 8
#: Writes in one REGION_WRITE_MULTI (QEMU: hw/vfio-user/protocol.h, VFIO_USER_MULTI_MAX).
MAX_MULTI_WRITES = 200
#: Descriptors that one sendmsg(2) can carry (include/net/scm.h, SCM_MAX_FD).
KERNEL_MAX_FDS = 253
#: First number that is no errno any more (include/linux/err.h, MAX_ERRNO).
ERRNO_LIMIT = 4096
