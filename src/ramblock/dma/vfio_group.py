# SPDX-License-Identifier: Apache-2.0
"""A VFIO group: devices that an IOMMU cannot tell apart, for one user (drivers/vfio/group.c)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.kernel_errors import Refused, refusal
from ramblock.process import OfOneProcess
from ramblock.uapi.vfio import (
    VFIO_GROUP_GET_DEVICE_FD,
    VFIO_GROUP_GET_STATUS,
    VFIO_GROUP_SET_CONTAINER,
    VFIO_GROUP_UNSET_CONTAINER,
    GroupFlags,
    GroupStatus,
)

__all__ = ["VfioGroup"]


class VfioGroup(OfOneProcess):
    """
    An open group.

    The kernel lets it be opened once, and keeps it open as long as one of its devices is.

    :param number: Of the IOMMU group.
    :param folder: Where the group's device file is.
    :raises DmaError: It cannot be opened; the hint says which devices have which drivers.
    """

    def __init__(self, number: int, *, folder: Path = Path("/dev/vfio")) -> None:
        self.number = number
        self._fd = Descriptor.open(folder / str(number), "VFIO group", group=number)

    @property
    def viable(self) -> bool:
        """Whether all of its devices are without a driver or with a VFIO one."""
        status = GroupStatus(argsz=ctypes.sizeof(GroupStatus))
        self._fd.call("VFIO_GROUP_GET_STATUS", VFIO_GROUP_GET_STATUS, status, group=self.number)
        return bool(status.flags & GroupFlags.VFIO_GROUP_FLAGS_VIABLE)

    def set_container(self, container: Descriptor) -> None:
        """
        Put it into *container*.

        :raises DmaError: EBUSY: it is not viable; the hint says why. Or the kernel refused. It is
            in no container.
        """
        if not self.viable:
            raise refusal(Refused("VFIO_GROUP_GET_STATUS", errno.EBUSY, group=self.number))
        argument = ctypes.create_string_buffer(4)
        ctypes.c_int32.from_buffer(argument).value = container.fileno()
        self._fd.call(
            "VFIO_GROUP_SET_CONTAINER", VFIO_GROUP_SET_CONTAINER, argument, group=self.number
        )

    def unset_container(self) -> None:
        """
        Take it out of its container.

        :raises DmaError: EBUSY: one of its devices is open. EINVAL: it is in none.
        """
        self._fd.call("VFIO_GROUP_UNSET_CONTAINER", VFIO_GROUP_UNSET_CONTAINER, group=self.number)

    def open_device(self, name: str) -> Descriptor:
        """
        Open the device *name*, a PCI address for instance.

        :raises DmaError: ENODEV: it is not in this group, or not bound to a VFIO driver. EINVAL:
            the group is in no container.
        """
        argument = ctypes.create_string_buffer(os.fsencode(name))
        fd = self._fd.call(
            "VFIO_GROUP_GET_DEVICE_FD", VFIO_GROUP_GET_DEVICE_FD, argument, group=self.number
        )
        return Descriptor(fd, f"VFIO device {name}")

    def close(self) -> None:
        """Close it; it stays in its container as long as a device is open."""
        self._fd.close()

    def __repr__(self) -> str:
        return f"<VfioGroup {self.number}{', closed' if self._fd.closed else ''}>"
