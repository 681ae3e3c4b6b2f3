# SPDX-License-Identifier: Apache-2.0
"""Assigned PCI devices: binding to vfio-pci, opening, and drivers for QEMU's two test devices."""

from ramblock.vfio.bounce import BouncePage
from ramblock.vfio.device import VfioDevice
from ramblock.vfio.edu import EduDevice
from ramblock.vfio.iommu_testdev import DmaResult, IommuTestdev, TransferTally
from ramblock.vfio.pci import PciAddress, bind_to_vfio, driver_of, find_devices, iommu_group
from ramblock.vfio.region import MappedRegion, Region

__all__ = [
    "BouncePage",
    "DmaResult",
    "EduDevice",
    "IommuTestdev",
    "MappedRegion",
    "PciAddress",
    "Region",
    "TransferTally",
    "VfioDevice",
    "bind_to_vfio",
    "driver_of",
    "find_devices",
    "iommu_group",
]
