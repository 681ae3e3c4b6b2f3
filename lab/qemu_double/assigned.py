# SPDX-License-Identifier: Apache-2.0
"""
The lab's devices, assigned to a guest by QEMU's vfio-pci: DMA through the kernel's IOMMU.

iommu-testdev writes to an address of the guest when the guest's driver, which is here, tells it to.
edu does no DMA here: it is a second device.
"""

from __future__ import annotations

from enum import Enum

from lab.qemu_double.guest import ConfidentialGuest
from lab.qemu_double.pci import find_device
from ramblock.vfio import DmaResult, IommuTestdev, PciAddress

__all__ = ["AssignedDevice", "Container", "GuestTestdev"]

_BAR = 0xFD00_0000
_TRIGGER, _IOVA_LOW, _IOVA_HIGH, _LENGTH, _RESULT, _DOORBELL = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14


class Container(Enum):
    """Which of the kernel's interfaces QEMU maps with."""

    TYPE1 = "type1"
    IOMMUFD = "iommufd"


class AssignedDevice:
    """
    A device of the host's, bound to vfio-pci.

    :param address: Where it is on the host.
    """

    def __init__(self, address: PciAddress, container: Container) -> None:
        self.address = address
        self.container = container

    def objects(self) -> list[str]:
        """Return the objects of QEMU that the device needs beside its own."""
        return ["iommufd,id=iommufd0"] if self.container is Container.IOMMUFD else []

    def properties(self) -> dict[str, object]:
        """Return the device as QEMU's -device and device_add take it."""
        properties: dict[str, object] = {"driver": "vfio-pci", "host": str(self.address)}
        if self.container is Container.IOMMUFD:
            properties["iommufd"] = "iommufd0"
        return properties

    def driver(self, guest: ConfidentialGuest) -> GuestTestdev:
        """
        Start the guest's driver, with which it does DMA; again after each reset of the guest.

        :raises LookupError: The guest has no iommu-testdev.
        """
        return GuestTestdev(guest)


class GuestTestdev:
    """
    The guest's driver of an iommu-testdev. A reset of the guest ends it; make another.

    :raises LookupError: The guest has none.
    """

    def __init__(self, guest: ConfidentialGuest) -> None:
        self._guest = guest
        find_device(guest, IommuTestdev.VENDOR, IommuTestdev.DEVICE).place(0, _BAR)

    def write(self, gpa: int) -> DmaResult:
        """Have it write the first four bytes of a page; tell what came of it."""
        for register, value in (
            (_IOVA_LOW, gpa & 0xFFFF_FFFF),
            (_IOVA_HIGH, gpa >> 32),
            (_LENGTH, 4),
            (_DOORBELL, 1),
        ):
            self._guest.write(_BAR + register, value, 4)
        self._guest.read(_BAR + _TRIGGER, 4)
        return DmaResult(self._guest.read(_BAR + _RESULT, 4))

    def reaches(self, gpa: int) -> bool:
        """Tell whether it can write there; where it can, it does."""
        return self.write(gpa).written

    def reached(self, start: int, size: int) -> set[int]:
        """Return the numbers of the pages of a range that it can write to; it does."""
        pages = range(start // 4096, (start + size) // 4096)
        return {page for page in pages if self.reaches(page * 4096)}
