# SPDX-License-Identifier: Apache-2.0
"""The kernel's parts of a run, watched like the others; apart from them because a run without KVM does without these imports."""

from __future__ import annotations

import ctypes
import os

from ramblock.kvm import GuestMemfd, KvmVm
from ramblock.kvm.descriptor import Descriptor
from ramblock.run.watched import PrivateFree, Watch, WatchedVm
from ramblock.units import PAGE_SIZE

__all__ = ["WatchedGuestMemfd", "WatchedKvm"]

_FALLOC_FL_KEEP_SIZE = 0x01  # include/uapi/linux/falloc.h; without it guest_memfd refuses
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class WatchedKvm(WatchedVm):
    """A VM of the kernel: its attributes, where it has any, and its memory slots."""

    def __init__(self, inner: KvmVm, watch: Watch) -> None:
        super().__init__(watch)
        self._inner = inner
        self.add_memory_slot = inner.add_memory_slot
        self.remove_memory_slot = inner.remove_memory_slot

    def set_for_guest(self, gpa: int, size: int, *, private: bool) -> None:
        """Set them in the kernel."""
        self._inner.set_memory_attributes(gpa, size, private)


class WatchedGuestMemfd(GuestMemfd):
    """
    A guest_memfd; its frees are watched.

    :param inner: Taken over: closed here, with a descriptor of its own for the same memory.
    """

    def __init__(self, inner: GuestMemfd, gpa: int, watch: Watch) -> None:
        with inner:
            descriptor = Descriptor(os.dup(inner.fd), "guest_memfd")
            super().__init__(descriptor, inner.size, inner.flags, inner.vm)
        self._free = PrivateFree(gpa, watch, super().discard, self.allocated_bytes)

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self._free(offset, size)

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
