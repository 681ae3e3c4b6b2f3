# SPDX-License-Identifier: Apache-2.0
"""
Whether the kernel converts pages of a guest_memfd in place (``ramblock.hostmem.in_place``).

The interface, KVM_SET_MEMORY_ATTRIBUTES2 on the descriptor of a guest_memfd, is in no release up to
Linux 7.3. The number of its capability differed between the revisions that were posted (245 to 250,
which released kernels use for other things by now), so asking for a capability would mean nothing.
The ioctl has had one number and size since the second revision ("KVM: guest_memfd: Add support for
KVM_SET_MEMORY_ATTRIBUTES2", 2026). As posted it answers ENOTTY as long as a VM's own attributes are
in force: the parameter ``kvm.vm_memory_attributes`` chooses, for all VMs of a host.
"""

from __future__ import annotations

import ctypes
import errno

from ramblock.kvm.vm import KvmVm
from ramblock.uapi import ioctl
from ramblock.uapi.kvm import KVMIO, Capability, GuestMemfdFlags
from ramblock.units import PAGE_SIZE

__all__ = ["has_in_place_conversion"]


class _MemoryAttributes2(ctypes.Structure):
    """``struct kvm_memory_attributes2`` as posted: offset, size, attributes, flags, ...."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


_SET_MEMORY_ATTRIBUTES2 = ioctl.iowr(KVMIO, 0xD2, _MemoryAttributes2)


def has_in_place_conversion(vm: KvmVm) -> bool:
    """
    Ask for nothing to be converted, of a guest_memfd of one page that is gone afterwards.

    A kernel that knows the request refuses a size of 0 (EINVAL); one that does not, or has it
    switched off, says ENOTTY.

    :raises OSError: Something else is wrong.
    """
    if not vm.capability(Capability.KVM_CAP_GUEST_MEMFD):
        return False
    flags = GuestMemfdFlags.GUEST_MEMFD_FLAG_MMAP & vm.guest_memfd_flags
    with vm.create_guest_memfd(PAGE_SIZE, flags) as memory:
        try:
            ioctl.call(memory.fd, _SET_MEMORY_ATTRIBUTES2, _MemoryAttributes2())
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return error.errno == errno.EINVAL
            raise
    return True
