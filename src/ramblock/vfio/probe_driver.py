# SPDX-License-Identifier: Apache-2.0
"""Drives the device of ``ramblock probe`` through a vfio-user client."""

from __future__ import annotations

import errno
import os
import struct
from threading import Lock

from ramblock.dma.vfio_user import VfioUserTarget
from ramblock.errors import DmaError, IommuFault, UsageError, describe_range
from ramblock.uapi.vfio import DeviceFlags, PciRegion
from ramblock.units import check_range
from ramblock.vfio.probe_registers import (
    DATA,
    DATA_SIZE,
    DEVICE,
    MAGIC,
    VENDOR,
    Command,
    Register,
)

__all__ = ["ProbeDriver"]

_BAR = PciRegion.VFIO_PCI_BAR0_REGION_INDEX
_CONFIG = PciRegion.VFIO_PCI_CONFIG_REGION_INDEX


class ProbeDriver:
    """
    DMA by the probe's device, from any thread.

    Each call is a transfer that is over when it returns.

    :param target: The client; stays the caller's.
    :raises UsageError: The server presents another device.
    :raises DmaError: The server does not answer.
    """

    def __init__(self, target: VfioUserTarget) -> None:
        self._target = target
        self._lock = Lock()
        ids = _pci_ids(target)
        if ids != (VENDOR, DEVICE):
            raise UsageError(
                f"{target!r}: device {ids[0]:04x}:{ids[1]:04x}",
                value=ids,
                expected=f"{VENDOR:04x}:{DEVICE:04x}, that of ramblock probe",
            )
        (magic,) = struct.unpack("<I", target.region_read(_BAR, Register.MAGIC, 4))
        if magic != MAGIC:
            raise UsageError(f"{target!r}: magic {magic:#x}", value=magic, expected=f"{MAGIC:#x}")

    def read(self, iova: int, size: int) -> bytes:
        """
        Have the device read memory.

        :param size: Bytes, at most 2048.
        :raises IommuFault: Not all of it is mapped.
        :raises DmaError: The server does not answer, or could not reach mapped memory.
        """
        with self._lock:
            self._run(Command.READ, iova, size)
            return self._target.region_read(_BAR, DATA, size)

    def write(self, iova: int, data: bytes) -> None:
        """Have the device write memory; raises as :meth:`read`."""
        with self._lock:
            self._target.region_write(_BAR, DATA, data)
            self._run(Command.WRITE, iova, len(data))

    def _run(self, command: Command, iova: int, size: int) -> None:
        check_range(0, size, limit=DATA_SIZE, align=1, what="transfer of the probe's device")
        registers = struct.pack("<QII", iova, size, command)
        self._target.region_write(_BAR, Register.ADDRESS, registers)
        (result,) = struct.unpack("<I", self._target.region_read(_BAR, Register.RESULT, 4))
        if result == errno.EFAULT:
            raise IommuFault(
                f"{describe_range(iova, size)} is not mapped for the probe's device",
                iova=iova,
                size=size,
                write=command == Command.WRITE,
            )
        if result:
            raise DmaError(
                result,
                f"transfer of the probe's device: {os.strerror(result)}",
                iova=iova,
                size=size,
            )


def _pci_ids(target: VfioUserTarget) -> tuple[int, int]:
    """Tell vendor and device; zeros where the server presents no PCI device."""
    info = target.device_info()
    if not info.flags & DeviceFlags.VFIO_DEVICE_FLAGS_PCI or info.num_regions <= _CONFIG:
        return 0, 0
    vendor, device = struct.unpack("<HH", target.region_read(_CONFIG, 0, 4))
    return vendor, device
