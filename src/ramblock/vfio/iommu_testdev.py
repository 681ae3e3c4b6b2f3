# SPDX-License-Identifier: Apache-2.0
"""
QEMU's iommu-testdev (hw/misc/iommu-testdev.c, QEMU 10.2): a DMA write at once, with its outcome.

It writes a pattern to an IOVA when a register is read, within that access. So it can be used in a
tight loop, and the loop shows gaps of a few microseconds in a mapping that other threads change.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from threading import Event

from ramblock.errors import DmaError, UsageError
from ramblock.uapi.vfio import PciRegion
from ramblock.units import check_range
from ramblock.vfio.device import VfioDevice

__all__ = ["DmaResult", "IommuTestdev", "TransferTally"]

# Enough to amortise looking at an Event, few enough that a loop ends at once.
_BATCH = 64
_PATTERN = (0x1234_5678).to_bytes(4, "little")
_ARM = 1
_MAX_LENGTH = 1 << 20


class DmaResult(IntEnum):
    """Values of the result register (ITD_DMA_* in include/hw/misc/iommu-testdev.h)."""

    OK = 0
    BAD_LENGTH = 0xDEAD_0001
    REFUSED = 0xDEAD_0002
    """The IOMMU did not let it through."""
    READ_BACK_FAILED = 0xDEAD_0003
    MISMATCH = 0xDEAD_0004
    """Written; the data read back from the physical address, which it was not told, differs."""
    NOT_ARMED = 0xDEAD_0005
    BAD_ATTRIBUTES = 0xDEAD_0006
    BUSY = 0xFFFF_FFFE
    IDLE = 0xFFFF_FFFF

    @property
    def written(self) -> bool:
        """
        Whether the IOMMU let the write through.

        The read-back bypasses the IOMMU and says nothing about it.
        """
        return self in (DmaResult.OK, DmaResult.READ_BACK_FAILED, DmaResult.MISMATCH)


class _Register(IntEnum):
    """Offsets in BAR 0; 32 bits wide (ITD_REG_DMA_*)."""

    TRIGGER = 0x00
    IOVA_LOW = 0x04
    IOVA_HIGH = 0x08
    LENGTH = 0x0C
    RESULT = 0x10
    DOORBELL = 0x14


@dataclass(slots=True)
class TransferTally:
    """Results of the transfers of a loop; may be read while it runs."""

    transfers: int = 0
    """Writes that were let through."""
    refusals: int = 0
    """Writes that the IOMMU refused."""


class IommuTestdev:
    """
    Drives one.

    Its DMA does not ask whether bus mastering is on, as that of any other device does.

    :param device: Opened through VFIO; stays the caller's. Bus mastering is switched on.
    :raises UsageError: It is another device.
    """

    VENDOR, DEVICE = 0x1B36, 0x0005

    def __init__(self, device: VfioDevice) -> None:
        if device.ids != (self.VENDOR, self.DEVICE):
            raise UsageError(f"{device!r} is not an iommu-testdev", value=device.ids)
        self.device = device
        device.enable_bus_mastering()
        self._registers = device.map_region(PciRegion.VFIO_PCI_BAR0_REGION_INDEX)

    @staticmethod
    def pattern(length: int) -> bytes:
        """Return the data that it writes."""
        return (_PATTERN * (length // 4 + 1))[:length]

    def dma_write(self, iova: int, length: int = 4) -> DmaResult:
        """
        Have it write :meth:`pattern` to *iova*.

        :param length: Bytes.
        :return: The result; ``result.written`` says whether the IOMMU let it through.
        :raises UsageError: Empty, or more than 1 MiB, for which QEMU would allocate as much at each
            access.
        """
        self._aim(iova, length)
        words = self._registers.words
        words[_Register.DOORBELL >> 2] = _ARM
        # Its value is always 0; the read runs the transfer.
        self._registers.read32(_Register.TRIGGER)
        return DmaResult(words[_Register.RESULT >> 2])

    def write_until(
        self, stop: Event, iova: int, length: int = 4, tally: TransferTally | None = None
    ) -> TransferTally:
        """
        Write over and over until *stop* is set.

        For a thread of its own, which alone uses the device meanwhile.

        :return: *tally*, or a new one.
        :raises DmaError: It neither writes nor is refused: it is switched off, or gone.
        """
        tally = TransferTally() if tally is None else tally
        self._aim(iova, length)
        words = self._registers.words
        doorbell, trigger, result = (
            register >> 2 for register in (_Register.DOORBELL, _Register.TRIGGER, _Register.RESULT)
        )
        refused = DmaResult.REFUSED.value
        written = frozenset(answer.value for answer in DmaResult if answer.written)
        while not stop.is_set():
            refusals = 0
            for _ in range(_BATCH):
                words[doorbell] = _ARM
                words[trigger]
                value = words[result]
                if value == refused:
                    refusals += 1
                elif value not in written:
                    raise DmaError(f"{self.device!r} answers {value:#x}: it does no DMA any more")
            tally.refusals += refusals
            tally.transfers += _BATCH - refusals
        return tally

    def _aim(self, iova: int, length: int) -> None:
        check_range(0, length, limit=_MAX_LENGTH, align=1, what="transfer of iommu-testdev")
        self._registers.write32(_Register.IOVA_LOW, iova & 0xFFFF_FFFF)
        self._registers.write32(_Register.IOVA_HIGH, iova >> 32)
        self._registers.write32(_Register.LENGTH, length)
