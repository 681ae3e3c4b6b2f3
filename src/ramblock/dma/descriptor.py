# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with one owner, and calls on it whose refusals are explained."""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from pathlib import Path

from ramblock.dma.kernel_errors import Refused, refusal
from ramblock.uapi import ioctl

__all__ = ["Descriptor"]


class Descriptor:
    """
    Closes its descriptor once: by :meth:`close`, or when nobody has it any more.

    Its number is not handed out after that, so that no call can hit a file that got the same number later.

    :param fd: What it owns from now on.
    :param name: For messages.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def open(cls, path: str | Path, what: str, *, group: int | None = None) -> Descriptor:
        """
        Open a device file for reading and writing.

        :param what: What it is, as the table of errors knows it after ``open``.
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

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._close.alive

    def fileno(self) -> int:
        """
        Tell the number.

        :raises DmaError: EBADF: it was closed.
        """
        if not self._close.alive:
            raise refusal(Refused(self.name, errno.EBADF), detail="it was closed")
        return self._fd

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

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        self._close()

    def __repr__(self) -> str:
        return f"<{self.name}, {'closed' if self.closed else self._fd}>"
