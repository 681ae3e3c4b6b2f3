# SPDX-License-Identifier: Apache-2.0
"""
One memory for both states of a page: the stuff of a block that converts in place.

A block with two sides holds each page once or twice, and a conversion frees the side that is left.
In place there is one memory, and the page stays: nothing is copied or freed, and the attribute that
says who may touch it belongs to the memory, by offset, not to the VM. The kernel keeps a page
shared as long as anybody else holds it: an IOMMU that still maps it, a read(2) under way. So to
private every device lets go first, and even then the answer may be EAGAIN.

The kernel's interface is KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd (offset, size, attributes,
flags; error_offset comes back), posted for Linux and in no release up to 7.3;
``ramblock.kvm.in_place`` probes for it. A backing for it is a guest_memfd made with
GUEST_MEMFD_FLAG_MMAP, mapped for ``address``, with that ioctl as
:meth:`InPlaceBacking.set_attributes`. ``ramblock.testing.SimulatedInPlace`` needs no kernel.
"""

from __future__ import annotations

import errno
from typing import Protocol, TypeGuard
from weakref import WeakSet

from ramblock.errors import UsageError
from ramblock.hostmem.backing import PrivateBacking, SharedBacking

#: Calls for an attribute that is refused with EAGAIN. Nobody waits in between: the memory's lock is
#: held, and the guest asks again anyway (KVM answers TDG.VP.VMCALL<MapGPA> with RETRY). Meanwhile
#: the kernel drops its own short holds, such as its per-CPU lists of pages.
TRIES = 4


class InPlaceBacking(SharedBacking, PrivateBacking, Protocol):
    """
    Memory whose pages are private or shared, each by itself; all of it starts private.

    It is both sides of its block, which closes it. ``read`` and ``write`` are the host's accesses;
    the backing refuses a private page (OSError).
    """

    @property
    def fd(self) -> int:
        """The descriptor, for the kernel and for devices."""

    def set_attributes(self, offset: int, size: int, private: bool) -> None:  # noqa: FBT001 - a VM's
        """
        Make ``[offset, offset + size)`` private or shared; no change where it is already.

        :raises OSError: Refused; pages in front of the refused one may be done. EAGAIN: somebody
            else still holds a page.
        """


_in_use: WeakSet[InPlaceBacking] = WeakSet()
_MEMBERS = (
    "fd", "address", "size", "page_size", "read", "write", "discard", "allocated_bytes", "close",
)  # fmt: skip


def is_in_place(private: object) -> TypeGuard[InPlaceBacking]:
    """Whether *private* is meant to be a memory for both states."""
    return callable(getattr(private, "set_attributes", None))


def check_in_place(private: InPlaceBacking, size: int, name: str) -> None:
    """Raise :class:`UsageError` unless *private* can be all of a block of *size* bytes."""
    value: object = private
    if missing := [member for member in _MEMBERS if not hasattr(private, member)]:
        expected = "an InPlaceBacking"
        wrong = f"sets attributes, but is no memory: it lacks {', '.join(missing)}"
    elif private in _in_use:
        # Two blocks would convert the same pages behind each other's back.
        expected = "an InPlaceBacking that no block has"
        wrong = "is all the memory of another block already"
    elif private.size != size:
        value, expected = private.size, f"{size:#x}"
        wrong = f"is to be all of its {size:#x} bytes, and has {private.size:#x}"
    else:
        return
    raise UsageError(f"block {name!r}: {private!r} {wrong}", value=value, expected=expected)


def take_in_place(private: InPlaceBacking) -> None:
    """Note that a block has it; there is no way back, because the block closes it."""
    _in_use.add(private)


def set_attributes(backing: InPlaceBacking, offset: int, size: int, *, private: bool) -> None:
    """Set attributes, :data:`TRIES` times while a page is held; OSError: part of it may be done."""
    for left in reversed(range(TRIES)):
        try:
            backing.set_attributes(offset, size, private)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN or not left:
                raise
