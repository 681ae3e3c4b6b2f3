# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with one owner: closed once, never used after that, and named in errors."""

from __future__ import annotations

import ctypes
import os
import weakref

from ramblock.errors import UsageError
from ramblock.uapi import ioctl

__all__ = ["Descriptor"]


class Descriptor:
    """
    Owns *fd* from now on, and closes it at the latest when nobody holds this object any more.

    :param fd: Open; not inheritable from here on (KVM_CREATE_GUEST_MEMFD, alone among its kind, does not set FD_CLOEXEC).
    :param name: For messages.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        os.set_inheritable(fd, False)  # noqa: FBT003 - takes no keyword

    @property
    def fd(self) -> int:
        """
        The number.

        :raises UsageError: It is closed: the number may be somebody else's by now.
        """
        if not self._close.alive:
            raise UsageError(f"{self.name} is closed", value=self.name)
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return not self._close.alive

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

    def close(self) -> None:
        """Close it; twice is the same as once."""
        self._close()
