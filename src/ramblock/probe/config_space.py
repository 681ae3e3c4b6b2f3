# SPDX-License-Identifier: Apache-2.0
"""
The config space of the probe's device: a type 0 header with one memory BAR, no interrupts.

Layout: PCI Local Bus Specification 3.0, chapter 6; numbers as in include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

import struct

from ramblock.vfio.probe_registers import BAR_SIZE, DEVICE, VENDOR

__all__ = ["CONFIG_SIZE", "ConfigSpace"]

CONFIG_SIZE = 256

_VENDOR, _COMMAND, _REVISION, _BAR0, _SUBSYSTEM = 0x00, 0x04, 0x08, 0x10, 0x2C
_CACHE_LINE, _LATENCY, _INTERRUPT_LINE = 0x0C, 0x0D, 0x3C
_CLASS_UNASSIGNED = 0xFF0000
# Memory space and bus master: all that the device has.
_COMMAND_MASK = 0x0006
_BUS_MASTER = 0x0004


class ConfigSpace:
    """256 bytes of which few can be written, as in hardware."""

    def __init__(self) -> None:
        self._bytes = bytearray(CONFIG_SIZE)
        self._mask = bytearray(CONFIG_SIZE)
        struct.pack_into("<HH", self._bytes, _VENDOR, VENDOR, DEVICE)
        struct.pack_into("<I", self._bytes, _REVISION, _CLASS_UNASSIGNED << 8 | 1)
        struct.pack_into("<HH", self._bytes, _SUBSYSTEM, VENDOR, DEVICE)
        struct.pack_into("<H", self._mask, _COMMAND, _COMMAND_MASK)
        # A driver writes ones to learn the size: the bits below it stay zero.
        struct.pack_into("<I", self._mask, _BAR0, ~(BAR_SIZE - 1) & 0xFFFF_FFFF)
        for register in (_CACHE_LINE, _LATENCY, _INTERRUPT_LINE):
            self._mask[register] = 0xFF

    @property
    def bus_master(self) -> bool:
        """Whether the driver allows DMA."""
        return bool(self._bytes[_COMMAND] & _BUS_MASTER)

    def read(self, offset: int, size: int) -> bytes:
        """Read ``[offset, offset + size)``, which lies inside."""
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write; read-only bits stay as they are."""
        for position, value in enumerate(data, offset):
            mask = self._mask[position]
            self._bytes[position] = self._bytes[position] & ~mask | value & mask

    def reset(self) -> None:
        """Forget a driver's writes."""
        for position, mask in enumerate(self._mask):
            self._bytes[position] &= ~mask
