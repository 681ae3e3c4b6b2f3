# SPDX-License-Identifier: Apache-2.0
"""A descriptor of KVM's: its calls name the object in their errors."""

from __future__ import annotations

import ctypes
import os
import threading

from ramblock.errors import UsageError
from ramblock.uapi import ioctl
from ramblock.uapi.owned import OwnedDescriptor

__all__ = ["Descriptor"]


class Descriptor(OwnedDescriptor):
    """
    Of /dev/kvm, a VM, a vCPU or a guest_memfd.

    A call and :meth:`close` wait for each other: a number that was closed meanwhile may be that of
    another VM.
    """

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        # Reentrant: the handler of a signal may close while its own thread is in a call.
        self._in_use = threading.RLock()

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
        try:
            with self._in_use:
                return ioctl.call(self.fd, request, argument)
        except OSError as error:
            number = error.errno or 0
            raise OSError(number, f"{self.name}: {what}: {os.strerror(number)}") from None

    def close(self) -> None:
        """Close it, after the call that is under way; nothing happens the second time."""
        with self._in_use:
            super().close()
