# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with one owner, and calls on it whose refusals are explained."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ramblock.dma.kernel_errors import Refused, refusal
from ramblock.errors import DmaError
from ramblock.uapi import ioctl
from ramblock.uapi.owned import OwnedDescriptor

__all__ = ["Descriptor"]


class Descriptor(OwnedDescriptor):
    """Of a container, a group, a device or an iommufd."""

    @classmethod
    def open(cls, path: str | Path, what: str, *, group: int | None = None) -> Descriptor:
        """
        Open a device file for reading and writing.

        :param what: Its kind, as the table of errors knows it after ``open``.
        :param group: The IOMMU group that it belongs to, for the message.
        :raises DmaError: The kernel refused.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or 0
            detail = None if what == str(path) else str(path)
            raise refusal(Refused(f"open {what}", number, group=group), detail=detail) from None
        return cls(fd, str(path))

    def _closed_error(self) -> DmaError:
        return refusal(Refused(self.name, errno.EBADF), detail="it was closed")

    def call(
        self,
        name: str,
        request: int,
        argument: int | ctypes.Structure | ctypes.Array[ctypes.c_char] = 0,
        *,
        group: int | None = None,
    ) -> int:
        """
        Make an ioctl that moves no mapping.

        :param name: Its name in the kernel's headers.
        :param group: The IOMMU group that it is about, for the message.
        :raises DmaError: The kernel refused; nothing has changed.
        """
        fd = self.fileno()
        try:
            return ioctl.call(fd, request, argument)
        except OSError as error:
            raise refusal(Refused(name, error.errno or 0, group=group)) from None
