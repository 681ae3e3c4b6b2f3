# SPDX-License-Identifier: Apache-2.0
"""
The kernel's private memory in a run, watched like the others.

Apart from them because a run without KVM does without these imports.
"""

from __future__ import annotations

import ctypes
import os

from ramblock.kvm import GuestMemfd
from ramblock.kvm.descriptor import Descriptor
from ramblock.run.watched import Watch, WatchedPrivate
from ramblock.units import PAGE_SIZE

__all__ = ["WatchedGuestMemfd"]

_FALLOC_FL_KEEP_SIZE = 0x01  # include/uapi/linux/falloc.h; without it guest_memfd refuses
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class WatchedGuestMemfd(GuestMemfd):
    """
    A guest_memfd; its frees are watched. It is one itself, since a VM takes no other private side.

    :param inner: Taken over, beside a descriptor of its own for the same memory.
    """

    def __init__(self, inner: GuestMemfd, gpa: int, watch: Watch) -> None:
        descriptor = Descriptor(os.dup(inner.fd), "guest_memfd")
        super().__init__(descriptor, inner.size, inner.flags, inner.vm)
        self._inner = inner
        self._watched = WatchedPrivate(inner, gpa, watch)

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self._watched.discard(offset, size)

    def close(self) -> None:
        """Close both descriptors."""
        self._inner.close()
        super().close()

    def use(self, offset: int) -> None:
        """
        Allocate a page in the guest's name, so that there is something to free.

        For a VM that does not know private pages: its guest never reaches guest_memfd.
        """
        if _libc.fallocate(self.fd, _FALLOC_FL_KEEP_SIZE, offset, PAGE_SIZE) != 0:
            number = ctypes.get_errno()
            raise OSError(
                number, f"fallocate({offset:#x}, {PAGE_SIZE:#x}) of {self!r}: {os.strerror(number)}"
            )
