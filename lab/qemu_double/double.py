# SPDX-License-Identifier: Apache-2.0
"""Makes guests and their devices, and ends them: the start of each script and test."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from lab.double import Programs, locate
from lab.qemu_double.assigned import AssignedDevice, Container
from lab.qemu_double.guest import ConfidentialGuest, Device, Way
from lab.qemu_double.options import GuestOptions
from lab.qemu_double.vfio_user import VfioUserDevice
from ramblock.trace import TraceWriter
from ramblock.vfio import IommuTestdev, bind_to_vfio, find_devices

__all__ = ["WAY_VARIABLE", "Double", "way_from_environment"]

WAY_VARIABLE = "RAMBLOCK_DOUBLE_WAY"
"""``pretend`` or ``real``; what ``python -m lab qemu`` tells its script."""


def way_from_environment() -> Way:
    """Return the way that the environment names; without a name, the real one in the lab's VM."""
    if name := os.environ.get(WAY_VARIABLE):
        return Way(name)
    return Way.REAL if os.environ.get("RAMBLOCK_LAB") == "1" else Way.PRETEND


class Double:
    """
    Makes guests and devices; everything ends with it.

    :param way: None: that of the environment.
    :param programs: None: those of the lab's cache.
    :raises LabError: The programs are not built.
    """

    def __init__(self, way: Way | None = None, programs: Programs | None = None) -> None:
        self.way = way_from_environment() if way is None else way
        self.programs = locate() if programs is None else programs
        self._stack = ExitStack()
        # A socket's path may have no more than 107 bytes, so the folder is not below a test's own.
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ramblock-double-"))
        self.folder = Path(folder)
        self._guests = 0
        self._devices = 0

    def guest(
        self, options: GuestOptions | None = None, *devices: Device, folder: Path | None = None
    ) -> ConfidentialGuest:
        """
        Start a guest.

        :param devices: Assigned from the start, in this order.
        :raises QemuEnded: QEMU does not take the machine.
        """
        if folder is None:
            folder = self.folder / f"guest{self._guests}"
            self._guests += 1
        folder.mkdir(exist_ok=True)
        guest = ConfidentialGuest(
            self.programs, self.way, options or GuestOptions(), folder, devices
        )
        return self._stack.enter_context(guest)

    def device(self) -> VfioUserDevice | AssignedDevice:
        """Return the way's usual device: vfio-user, or the lab's iommu-testdev on iommufd."""
        if self.way is Way.PRETEND:
            return self.vfio_user_device()
        return self.assigned_device(IommuTestdev.VENDOR, IommuTestdev.DEVICE, Container.IOMMUFD)

    def vfio_user_device(self, trace: TraceWriter | None = None) -> VfioUserDevice:
        """Make a vfio-user device, served by a thread of this process."""
        path = self.folder / f"device{self._devices}"
        self._devices += 1
        return self._stack.enter_context(VfioUserDevice(path, trace))

    def assigned_device(self, vendor: int, device: int, container: Container) -> AssignedDevice:
        """
        Bind the one device of the host that has these IDs to vfio-pci, until the double ends.

        :raises LookupError: There is none, or more than one.
        :raises DmaError: It cannot be bound.
        """
        found = find_devices(vendor, device)
        if len(found) != 1:
            raise LookupError(f"{len(found)} PCI devices {vendor:04x}:{device:04x}, expected 1")
        address = self._stack.enter_context(bind_to_vfio(found[0]))
        return AssignedDevice(address, container)

    def close(self) -> None:
        """End guests and devices, the newest first."""
        self._stack.close()

    def __enter__(self) -> Double:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
