# SPDX-License-Identifier: Apache-2.0
"""The kernel's private backing for guest pages (virt/kvm/guest_memfd.c)."""

from __future__ import annotations

from ramblock.hostmem.backing import punch_hole
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.page_cache import cached_bytes
from ramblock.process import ClosedAtEnd
from ramblock.uapi.kvm import GuestMemfdFlags
from ramblock.units import PAGE_SIZE, check_range, format_size

__all__ = ["GuestMemfd"]


class GuestMemfd(ClosedAtEnd):
    """
    A guest_memfd of one VM: a private backing for :class:`~ramblock.RamBlock`.

    Made by :meth:`KvmVm.create_guest_memfd`.

    It is the caller's to close, like every private backing. The kernel keeps the VM as long as one
    of its guest_memfds is open, and a VM whose guest_memfd is gone answers each access to those
    pages with a memory fault.
    """

    def __init__(
        self, descriptor: Descriptor, size: int, flags: GuestMemfdFlags, vm: object
    ) -> None:
        self._descriptor = descriptor
        self.size = size
        self.flags = flags
        #: The KvmVm that can use it; no other can.
        self.vm = vm

    @property
    def fd(self) -> int:
        """
        The descriptor that a memory slot names.

        :raises UsageError: It is closed.
        """
        return self._descriptor.fd

    def discard(self, offset: int, size: int) -> None:
        """
        Free pages by punching a hole; the guest finds zeros there when it touches them again.

        :param offset: In bytes, a multiple of the page size.
        :param size: In bytes, a multiple of the page size.
        :raises UsageError: Unaligned, empty, outside, or it is closed; nothing is freed.
        :raises OSError: The kernel refused.
        """
        check_range(offset, size, limit=self.size, align=PAGE_SIZE, what=repr(self))
        punch_hole(self.fd, offset, size)

    def allocated_bytes(self) -> int | None:
        """Count the bytes of memory in use; None where the kernel does not tell."""
        return cached_bytes(self.fd)

    def close(self) -> None:
        """Close the descriptor, and with it free the pages. Twice is the same as once."""
        self._descriptor.close()

    def __repr__(self) -> str:
        return f"<GuestMemfd: {format_size(self.size)}>"
