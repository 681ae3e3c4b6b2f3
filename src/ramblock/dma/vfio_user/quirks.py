# SPDX-License-Identifier: Apache-2.0
"""
The other layout of DMA_READ and DMA_WRITE.

The specification gives their count eight bytes and puts the data behind it. QEMU's client (hw/vfio-user/protocol.h,
VFIOUserDMARW) reads and writes a count of four bytes, the data right behind those, and four bytes of padding at the end, so
that the sizes are the same and the data is not. It answers a DMA_WRITE with a header alone.
"""

from __future__ import annotations

import struct

from ramblock.dma.vfio_user.layout import MalformedError
from ramblock.dma.vfio_user.requests import DMA_ACCESS

__all__ = ["is_short", "lengthen", "shorten"]

_SHORT = struct.Struct("=QI")
_PADDING = bytes(DMA_ACCESS.size - _SHORT.size)


def is_short(payload: bytes) -> bool:
    """
    Tell whether a DMA_READ reply can only be QEMU's.

    It cannot be told where the data begins with four zero bytes: both layouts are possible then.
    """
    if len(payload) < DMA_ACCESS.size:
        return False
    size = len(payload) - DMA_ACCESS.size
    _, count = DMA_ACCESS.unpack_from(payload)
    return bool(count != size and count & 0xFFFF_FFFF == size)


def lengthen(payload: bytes) -> bytes:
    """
    Turn QEMU's layout of a reply to DMA_READ into the specification's.

    :raises MalformedError: It is shorter than its fixed part.
    """
    if len(payload) < DMA_ACCESS.size:
        raise MalformedError(f"payload of {len(payload):#x} bytes")
    address, count = _SHORT.unpack_from(payload)
    end = len(payload) - len(_PADDING)
    return DMA_ACCESS.pack(address, count) + payload[_SHORT.size : end]


def shorten(payload: bytes) -> bytes:
    """Turn the specification's layout of a DMA_WRITE into QEMU's."""
    address, count = DMA_ACCESS.unpack_from(payload)
    return _SHORT.pack(address, count) + payload[DMA_ACCESS.size :] + _PADDING
