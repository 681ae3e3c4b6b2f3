# SPDX-License-Identifier: Apache-2.0
"""
A PCI device opened through VFIO: by its group in a type1 container, or by iommufd.

A device keeps its target alive, not the other way round. Either may be closed first: closing the
target unmaps everything, closing the device detaches it. Both may be closed twice.
"""

from __future__ import annotations

import ctypes
import struct
from contextlib import ExitStack
from pathlib import Path

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.iommufd import IommufdIoas
from ramblock.dma.type1 import Type1Container
from ramblock.dma.vfio_group import VfioGroup
from ramblock.errors import UsageError
from ramblock.process import ClosedAtEnd
from ramblock.uapi.vfio import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_GET_INFO,
    VFIO_DEVICE_RESET,
    DeviceAttachIommufd,
    DeviceBindIommufd,
    DeviceDetachIommufd,
    DeviceFlags,
    DeviceInfo,
    PciRegion,
)
from ramblock.vfio.pci import PciAddress, iommu_group, note_open, vfio_cdev
from ramblock.vfio.region import MappedRegion, Region

__all__ = ["VfioDevice"]

# include/uapi/linux/pci_regs.h
_PCI_COMMAND = 0x04
_PCI_COMMAND_MEMORY = 0x2
_PCI_COMMAND_MASTER = 0x4

_SYSFS, _DEV = Path("/sys"), Path("/dev")


class VfioDevice(ClosedAtEnd):
    """
    An open device; also a context manager. Made by :meth:`open_by_group` and :meth:`open_by_cdev`.

    :param address: Which device.
    :param fd: Its descriptor, owned from now on.
    :param target: Its DMA target.
    """

    def __init__(
        self, address: PciAddress, fd: Descriptor, target: Type1Container | IommufdIoas
    ) -> None:
        self.address = address
        self.target = target
        self._fd = fd
        self._regions: dict[int, Region] = {}
        self._mapped: list[MappedRegion] = []
        note_open(address, fd)
        info = DeviceInfo(argsz=ctypes.sizeof(DeviceInfo))
        fd.call("VFIO_DEVICE_GET_INFO", VFIO_DEVICE_GET_INFO, info)
        self.flags = DeviceFlags(info.flags)
        #: Highest region index plus one; not each of them need exist.
        self.region_count = info.num_regions

    @classmethod
    def open_by_group(
        cls,
        address: PciAddress,
        container: Type1Container,
        *,
        sysfs: Path = _SYSFS,
        dev: Path = _DEV,
    ) -> VfioDevice:
        """
        Open a device that is bound to vfio-pci; put its group into *container* if needed.

        :raises DmaError: It is not bound, its group is not viable or belongs to somebody else, or
            its interrupts cannot be isolated. The device is not open; its group stays in the
            container if only the device could not be opened.
        """
        number = iommu_group(address, sysfs=sysfs)
        group = container.group(number)
        if group is None:
            group = VfioGroup(number, folder=dev / "vfio")
            try:
                container.add_group(group)
            except BaseException:
                group.close()
                raise
        return cls._wrap(address, group.open_device(str(address)), container)

    @classmethod
    def open_by_cdev(
        cls, address: PciAddress, ioas: IommufdIoas, *, sysfs: Path = _SYSFS, dev: Path = _DEV
    ) -> VfioDevice:
        """
        Open a device that is bound to vfio-pci, bind it to the iommufd of *ioas* and attach it.

        :raises DmaError: It is not bound to vfio-pci, is in use otherwise, or earlier mappings lie
            beyond its reach. The device is not open.
        """
        fd = Descriptor.open(vfio_cdev(address, sysfs=sysfs, dev=dev), "VFIO device")
        try:
            argument = DeviceBindIommufd(
                argsz=ctypes.sizeof(DeviceBindIommufd), iommufd=ioas.fileno()
            )
            fd.call(
                "VFIO_DEVICE_BIND_IOMMUFD", VFIO_DEVICE_BIND_IOMMUFD, argument,
                group=iommu_group(address, sysfs=sysfs),
            )  # fmt: skip
        except BaseException:
            fd.close()
            raise
        device = cls._wrap(address, fd, ioas)
        try:
            device.attach()
        except BaseException:
            device.close()
            raise
        return device

    @classmethod
    def _wrap(
        cls, address: PciAddress, fd: Descriptor, target: Type1Container | IommufdIoas
    ) -> VfioDevice:
        try:
            return cls(address, fd, target)
        except BaseException:
            fd.close()
            raise

    # -- the address space -------------------------------------------------------------------------

    def attach(self) -> None:
        """
        Let it reach its target's mappings; the existing ones are pinned now.

        :raises UsageError: It was opened by its group: then it is attached as long as it is open.
        :raises DmaError: It is attached already, memory cannot be pinned, or a mapping lies where
            it cannot reach.
        """
        target = self._ioas("attached")
        argument = DeviceAttachIommufd(
            argsz=ctypes.sizeof(DeviceAttachIommufd), pt_id=target.ioas_id
        )
        self._fd.call("VFIO_DEVICE_ATTACH_IOMMUFD_PT", VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument)
        target.refresh()

    def detach(self) -> None:
        """
        Let it reach nothing; it stays open.

        The target's mappings stay for other devices.

        :raises UsageError: It was opened by its group: close it instead.
        """
        target = self._ioas("detached")
        argument = DeviceDetachIommufd(argsz=ctypes.sizeof(DeviceDetachIommufd))
        self._fd.call("VFIO_DEVICE_DETACH_IOMMUFD_PT", VFIO_DEVICE_DETACH_IOMMUFD_PT, argument)
        target.refresh()

    def _ioas(self, verb: str) -> IommufdIoas:
        if not isinstance(self.target, IommufdIoas):
            raise UsageError(f"{self!r} was opened by its group and cannot be {verb}", value=self)
        return self.target

    # -- the device --------------------------------------------------------------------------------

    def region(self, index: int) -> Region:
        """
        Give access to a region.

        :raises DmaError: EINVAL: it has none of that index.
        """
        if index not in self._regions:
            self._regions[index] = Region(self._fd, index)
        return self._regions[index]

    def map_region(self, index: int) -> MappedRegion:
        """
        Map all of a region into the process, for accesses without a system call.

        Closed with the device.

        :raises UsageError: The kernel lets only parts of it be mapped, or nothing.
        """
        mapped = MappedRegion(self._fd, self.region(index).layout)
        note_open(self.address, mapped)
        self._mapped.append(mapped)
        return mapped

    @property
    def config(self) -> Region:
        """Its config space."""
        return self.region(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)

    @property
    def ids(self) -> tuple[int, int]:
        """Vendor and device ID, from its config space."""
        vendor, device = struct.unpack("<HH", self.config.read(0, 4))
        return vendor, device

    @property
    def bus_master(self) -> bool:
        """Whether it may do DMA at all."""
        return bool(self._command() & _PCI_COMMAND_MASTER)

    def enable_bus_mastering(self) -> None:
        """Let it do DMA, and answer to accesses of its memory."""
        self._set_command(self._command() | _PCI_COMMAND_MEMORY | _PCI_COMMAND_MASTER)

    def disable_bus_mastering(self) -> None:
        """Stop its DMA in spite of mappings."""
        self._set_command(self._command() & ~_PCI_COMMAND_MASTER)

    def _command(self) -> int:
        (command,) = struct.unpack("<H", self.config.read(_PCI_COMMAND, 2))
        return int(command)

    def _set_command(self, command: int) -> None:
        self.config.write(_PCI_COMMAND, struct.pack("<H", command))

    def reset(self) -> None:
        """
        Put it into the state after power-on, as far as it can be reset; bus mastering is off then.

        :raises UsageError: It has no reset.
        """
        if DeviceFlags.VFIO_DEVICE_FLAGS_RESET not in self.flags:
            raise UsageError(f"{self!r} cannot be reset", value=self)
        self._fd.call("VFIO_DEVICE_RESET", VFIO_DEVICE_RESET)

    # -- the end -----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd.closed

    def close(self) -> None:
        """
        Detach and close it, and all that is mapped of its regions.

        Nothing happens the second time.
        """
        with ExitStack() as everything:  # one that is still in use must not keep the others open
            everything.callback(self._fd.close)
            for mapped in self._mapped:
                everything.callback(mapped.close)

    def __repr__(self) -> str:
        return f"<VfioDevice {self.address}{', closed' if self.closed else ''}>"
