# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: the kernel's abilities, and new VMs."""

from __future__ import annotations

import errno
import os

from ramblock.kvm.cpuid import CpuidTable, read_supported
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.vm import KvmVm, VmType
from ramblock.process import ClosedAtEnd
from ramblock.uapi.kvm import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    Capability,
    GuestMemfdFlags,
    MemoryAttributes,
)

__all__ = ["Kvm"]

_HINTS = {
    errno.ENOENT: "load kvm_intel or kvm_amd; in a VM, the host has to allow nesting",
    errno.ENODEV: "load kvm_intel or kvm_amd; in a VM, the host has to allow nesting",
    errno.ENXIO: "load kvm_intel or kvm_amd; in a VM, the host has to allow nesting",
    errno.EACCES: "join the group that owns it",
    errno.EPERM: "the container or sandbox has to be given the device",
}


class Kvm(ClosedAtEnd):
    """
    The kernel's KVM. A context manager; VMs live on when it is closed.

    :param path: The device.
    :raises OSError: It cannot be opened, or speaks another version; the text has a hint.
    """

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        name = os.fspath(path)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or 0
            hint = f"; {_HINTS[number]}" if number in _HINTS else ""
            raise OSError(number, f"{os.strerror(number)}{hint}", name) from None
        self._descriptor = Descriptor(fd, name)
        try:
            self._check_version()
        except BaseException:
            self.close()
            raise

    def _check_version(self) -> None:
        version = self._descriptor.call(KVM_GET_API_VERSION, "KVM_GET_API_VERSION")
        if version != KVM_API_VERSION:
            raise OSError(
                errno.EPROTO,
                f"{self._descriptor.name} speaks version {version} of KVM's API,"
                f" not {KVM_API_VERSION}",
            )

    def capability(self, capability: Capability) -> int:
        """
        Ask for a capability of the kernel; a VM may have less (:meth:`KvmVm.capability`).

        :return: 0: it has none. The meaning of another number is the capability's own.
        """
        return self._descriptor.call(KVM_CHECK_EXTENSION, capability.name, capability)

    @property
    def vm_types(self) -> frozenset[VmType]:
        """The types that :meth:`create_vm` takes."""
        bits = self.capability(Capability.KVM_CAP_VM_TYPES)
        # A kernel without the capability knows one type (Linux before 6.8).
        return frozenset(type for type in VmType if bits >> type & 1) or frozenset({VmType.DEFAULT})

    @property
    def memory_attributes(self) -> MemoryAttributes:
        """The page attributes that some type of VM has; none: the kernel knows no private pages."""
        return MemoryAttributes(self.capability(Capability.KVM_CAP_MEMORY_ATTRIBUTES))

    @property
    def has_guest_memfd(self) -> bool:
        """Whether it has guest_memfd."""
        return self.capability(Capability.KVM_CAP_GUEST_MEMFD) > 0

    @property
    def guest_memfd_flags(self) -> GuestMemfdFlags:
        """
        The flags that guest_memfd takes for some type of VM.

        A VM of another type may refuse them.
        """
        return GuestMemfdFlags(self.capability(Capability.KVM_CAP_GUEST_MEMFD_FLAGS))

    @property
    def exit_hypercall(self) -> int:
        """The hypercalls that can be handed to user space, as bits by number."""
        return self.capability(Capability.KVM_CAP_EXIT_HYPERCALL)

    def supported_cpuid(self) -> CpuidTable:
        """Return the CPUID entries that a vCPU can have here, for :meth:`Vcpu.set_cpuid`."""
        return read_supported(self._descriptor)

    def create_vm(self, type: VmType = VmType.DEFAULT) -> KvmVm:
        """
        Make a VM without memory and vCPUs.

        :raises OSError: EINVAL: the kernel does not have this type, see :attr:`vm_types`.
        """
        run_size = self._descriptor.call(KVM_GET_VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE")
        while True:
            try:
                fd = self._descriptor.call(KVM_CREATE_VM, f"VM of type {type.name}", type)
            except InterruptedError:
                # A signal came while the kernel waited for its notifiers (mmu_notifier_register());
                # nothing was made.
                continue
            return KvmVm(Descriptor(fd, "VM"), type, run_size=run_size)

    def close(self) -> None:
        """Close it; twice is the same as once."""
        self._descriptor.close()

    def __repr__(self) -> str:
        return f"<Kvm {self._descriptor.name}{', closed' if self._descriptor.closed else ''}>"
