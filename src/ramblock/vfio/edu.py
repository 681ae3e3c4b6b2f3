# SPDX-License-Identifier: Apache-2.0
"""
QEMU's educational device (docs/specs/edu.rst, hw/misc/edu.c): ten transfers a second.

It copies up to 4 KiB, in either direction, between memory and a buffer that only it sees. Whether
the IOMMU let a transfer through it does not say: a read through a fault gives zeros, a write is
lost.
"""

from __future__ import annotations

import time
from enum import IntEnum

from ramblock.errors import DmaError, UsageError
from ramblock.uapi.vfio import PciRegion
from ramblock.units import check_range
from ramblock.vfio.bounce import BouncePage
from ramblock.vfio.device import VfioDevice

__all__ = ["EduDevice"]

_BUFFER = 0x40000
_BUFFER_SIZE = 4096
_RUN = 0x1
_TO_MEMORY = 0x2
# A transfer runs off a timer of 100 ms; an emulated machine on a busy host may take much longer.
_TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.01


class _Register(IntEnum):
    """Offsets in BAR 0; 64 bits wide."""

    SOURCE = 0x80
    DESTINATION = 0x88
    COUNT = 0x90
    COMMAND = 0x98


class EduDevice:
    """
    Drives one.

    Its DMA mask is 28 bits unless QEMU was told otherwise (``dma_mask``); addresses above are cut
    off to it without a word.

    :param device: Opened through VFIO; stays the caller's. Bus mastering is switched on.
    :raises UsageError: It is another device.
    """

    VENDOR, DEVICE = 0x1234, 0x11E8
    BUFFER_SIZE = _BUFFER_SIZE

    def __init__(self, device: VfioDevice) -> None:
        if device.ids != (self.VENDOR, self.DEVICE):
            raise UsageError(f"{device!r} is not an edu device", value=device.ids)
        self.device = device
        device.enable_bus_mastering()
        self._registers = device.map_region(PciRegion.VFIO_PCI_BAR0_REGION_INDEX)

    def load(self, iova: int, size: int) -> None:
        """
        Have it read ``[iova, iova + size)`` into its buffer.

        :param size: Bytes, at most 4096.
        :raises UsageError: Empty, or larger than its buffer, beyond which QEMU would read.
        :raises DmaError: It did not finish within half a minute.
        """
        self._transfer(source=iova, destination=_BUFFER, size=size, command=_RUN)

    def store(self, iova: int, size: int) -> None:
        """Have it write the first *size* bytes of its buffer to *iova*; raises as :meth:`load`."""
        self._transfer(source=_BUFFER, destination=iova, size=size, command=_RUN | _TO_MEMORY)

    def read_from_ram(self, iova: int, size: int, bounce: BouncePage) -> bytes:
        """
        Read memory as the device: into its buffer, and from there through *bounce*.

        Zeros where it faulted.
        """
        self.load(iova, size)
        # The device's store may fault as well, and would leave the old data.
        bounce.write(bytes(size))
        self.store(bounce.iova, size)
        return bounce.read(size)

    def write_to_ram(self, iova: int, data: bytes, bounce: BouncePage) -> None:
        """Write memory as the device: *data* goes through *bounce* and its buffer to *iova*."""
        bounce.write(data)
        self.load(bounce.iova, len(data))
        self.store(iova, len(data))

    def _transfer(self, *, source: int, destination: int, size: int, command: int) -> None:
        check_range(0, size, limit=_BUFFER_SIZE, align=1, what="transfer of edu")
        registers = self._registers
        registers.write64(_Register.SOURCE, source)
        registers.write64(_Register.DESTINATION, destination)
        registers.write64(_Register.COUNT, size)
        registers.write64(_Register.COMMAND, command)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while registers.read64(_Register.COMMAND) & _RUN:
            if time.monotonic() > deadline:
                raise DmaError(f"{self.device!r} did not finish a transfer of {size} bytes")
            time.sleep(_POLL_SECONDS)
