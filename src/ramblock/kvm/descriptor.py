# SPDX-License-Identifier: Apache-2.0
"""A descriptor of KVM's: its calls name the object in their errors."""

from __future__ import annotations

import ctypes
import os

from ramblock.errors import UsageError
from ramblock.uapi import ioctl
from ramblock.uapi.owned import OwnedDescriptor

__all__ = ["Descriptor"]


class Descriptor(OwnedDescriptor):
    """Of /dev/kvm, a VM, a vCPU or a guest_memfd."""

    @property
    def fd(self) -> int:
        """
        The number.

        :raises UsageError: It is closed: the number may be somebody else's by now.
        """
        return self.fileno()

    def _closed_error(self) -> UsageError:
        return UsageError(f"{self.name} is closed", value=self.name)

    def call(
        self,
        request: int,
        what: str,
        argument: int | ctypes.Structure | ctypes.Array[ctypes.c_char] = 0,
    ) -> int:
        """
        Make an ioctl.

        :param what: Names the request and its object in the error.
        :raises OSError: With the kernel's errno.
        :raises UsageError: It is closed; nothing was called.
        """
        fd = self.fd
        try:
            return ioctl.call(fd, request, argument)
        except OSError as error:
            number = error.errno or 0
            raise OSError(number, f"{self.name}: {what}: {os.strerror(number)}") from None
