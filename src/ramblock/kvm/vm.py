# SPDX-License-Identifier: Apache-2.0
"""A virtual machine of KVM: memory slots, page attributes, guest_memfds and vCPUs."""

from __future__ import annotations

import errno
from enum import IntEnum

from ramblock.discard.section import RamSection
from ramblock.errors import UsageError, describe_range
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.guest_memfd import GuestMemfd
from ramblock.kvm.slots import SlotTable
from ramblock.kvm.vcpu import Vcpu
from ramblock.process import ClosedAtEnd
from ramblock.uapi.kvm import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_ENABLE_CAP,
    KVM_SET_MEMORY_ATTRIBUTES,
    Capability,
    GuestMemfdFlags,
    KvmCreateGuestMemfd,
    KvmEnableCap,
    KvmMemoryAttributes,
    MemoryAttributes,
    VmTypeNumber,
)
from ramblock.uapi.kvm_para import KVM_HC_MAP_GPA_RANGE
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_range, format_size

__all__ = ["KvmVm", "VmType"]

_NO_FLAGS = GuestMemfdFlags(0)
_PRIVATE = MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE


class VmType(IntEnum):
    """The type of VM."""

    DEFAULT = VmTypeNumber.KVM_X86_DEFAULT_VM
    """An ordinary one. It has no private pages: attributes are tracked and not enforced."""
    SW_PROTECTED = VmTypeNumber.KVM_X86_SW_PROTECTED_VM
    """
    Private pages without encryption, for testing (CONFIG_KVM_SW_PROTECTED_VM).

    One trait of it, in Linux 7.3: where its guest looked while nothing was there, KVM keeps an MMIO
    entry that neither a slot nor an attribute removes, and takes an access through it for a shared
    one (kvm_mmu_page_fault(), arch/x86/kvm/mmu/mmu.c). A private page that appears there later is
    then answered with a memory fault, flags 0.
    """


class KvmVm(ClosedAtEnd):
    """
    A VM, made by :meth:`Kvm.create_vm`.

    Satisfies :class:`~ramblock.guest.Vm` and :class:`~ramblock.guest.MemorySlots`.

    A context manager. The kernel keeps the VM until the last descriptor of it is closed: its own,
    those of its vCPUs, which :meth:`close` closes too, and those of its guest_memfds, which belong
    to their makers. Any order is safe.

    Slots and attributes are changed by one thread at a time: a :class:`~ramblock.GuestMemory` does
    so under its lock.
    """

    def __init__(self, descriptor: Descriptor, type: VmType, *, run_size: int) -> None:
        self.type = type
        self._descriptor = descriptor
        self._run_size = run_size
        self._vcpus: list[Vcpu] = []
        self._next_id = 0
        self._slots = SlotTable(descriptor, self.capability(Capability.KVM_CAP_NR_MEMSLOTS))
        #: Whether the kernel knows private pages for this VM. If not, attributes are only tracked,
        #: by the page states.
        self.enforces_attributes = bool(
            self.capability(Capability.KVM_CAP_MEMORY_ATTRIBUTES) & _PRIVATE
        )

    @property
    def fd(self) -> int:
        """
        Its descriptor.

        :raises UsageError: It is closed.
        """
        return self._descriptor.fd

    def capability(self, capability: Capability) -> int:
        """
        Ask for a capability of this VM, which may be less than that of :meth:`Kvm.capability`.

        :return: 0: it has none.
        """
        return self._descriptor.call(KVM_CHECK_EXTENSION, capability.name, capability)

    @property
    def guest_memfd_flags(self) -> GuestMemfdFlags:
        """The flags that :meth:`create_guest_memfd` takes."""
        return GuestMemfdFlags(self.capability(Capability.KVM_CAP_GUEST_MEMFD_FLAGS))

    # -- memory ------------------------------------------------------------------------------------

    def set_memory_attributes(
        self,
        gpa: int,
        size: int,
        private: bool,  # noqa: FBT001 - a fixed name
    ) -> None:
        """
        Make ``[gpa, gpa + size)`` private or shared for the guest, whole or not at all.

        It may span slots and holes. Nothing happens where :attr:`enforces_attributes` is False, or
        when the VM is closed and there is no guest any more.

        :raises UsageError: Unaligned, empty or past 2**64; nothing has changed.
        :raises OSError: Refused (ENOMEM); nothing has changed.
        """
        check_range(gpa, size, limit=ADDRESS_LIMIT, align=PAGE_SIZE, what="memory attributes")
        if not self.enforces_attributes or self._descriptor.closed:
            return
        state = "private" if private else "shared"
        self._descriptor.call(
            KVM_SET_MEMORY_ATTRIBUTES,
            f"KVM_SET_MEMORY_ATTRIBUTES {describe_range(gpa, size)} {state}",
            KvmMemoryAttributes(address=gpa, size=size, attributes=_PRIVATE if private else 0),
        )

    def create_guest_memfd(self, size: int, flags: GuestMemfdFlags = _NO_FLAGS) -> GuestMemfd:
        """
        Make a private backing of *size* bytes; nothing is allocated yet.

        :raises UsageError: *size* is not a positive multiple of the page size.
        :raises OSError: EINVAL: the kernel does not have *flags* for this VM; ENOTTY: it has no
            guest_memfd.
        """
        check_range(0, size, limit=(1 << 63) - 1, align=PAGE_SIZE, what="guest_memfd")
        fd = self._descriptor.call(
            KVM_CREATE_GUEST_MEMFD,
            f"guest_memfd of {format_size(size)}, {flags!r}",
            KvmCreateGuestMemfd(size=size, flags=flags),
        )
        return GuestMemfd(Descriptor(fd, "guest_memfd"), size, flags, self)

    def add_memory_slot(self, section: RamSection) -> None:
        """
        Let the guest see *section*, with the guest_memfd of its block where it has one.

        If it sees it already, nothing happens.

        :raises UsageError: The block's private side cannot serve this VM; the guest does not see
            it.
        :raises OSError: Refused: the guest does not see it.
        """
        self._slots.add(section, self._private_side(section))

    def remove_memory_slot(self, section: RamSection) -> None:
        """
        Take *section* away from the guest.

        If it does not see it, or the VM is closed, nothing happens.

        :raises OSError: Refused: the guest still sees it.
        """
        self._slots.remove(section)

    def _private_side(self, section: RamSection) -> GuestMemfd | None:
        """Check the private side of a slot; None: it needs none."""
        private = section.block.private
        if not isinstance(private, GuestMemfd):
            if private is not None and self.enforces_attributes:
                raise UsageError(
                    f"{section!r}: the guest could not touch its private pages:"
                    f" {private!r} is no guest_memfd",
                    value=private,
                    expected="a GuestMemfd of this VM",
                )
            return None
        if private.vm is not self:
            raise UsageError(
                f"{section!r}: {private!r} belongs to another VM",
                value=private,
                expected="a GuestMemfd of this VM",
            )
        if private.flags & GuestMemfdFlags.GUEST_MEMFD_FLAG_MMAP:
            # KVM_MEMSLOT_GMEM_ONLY: the guest's shared pages would come from it too, where no
            # device looks.
            raise UsageError(
                f"{section!r}: a guest_memfd that can be mapped serves shared pages as well,"
                " and hides the block's own",
                value=private,
                expected="a GuestMemfd without GUEST_MEMFD_FLAG_MMAP",
            )
        if section.readonly:
            raise UsageError(
                f"{section!r}: a slot with guest_memfd cannot be read-only",
                value=section,
                expected="a read-only section of ordinary RAM",
            )
        return private

    # -- vCPUs -------------------------------------------------------------------------------------

    def enable_map_gpa_range_exits(self) -> None:
        """
        Let the guest's KVM_HC_MAP_GPA_RANGE come out of :meth:`Vcpu.run`.

        Without it KVM answers the guest -ENOSYS.

        :raises OSError: EOPNOTSUPP: the kernel does not have it.
        """
        bit = 1 << KVM_HC_MAP_GPA_RANGE
        if not self.capability(Capability.KVM_CAP_EXIT_HYPERCALL) & bit:
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self._descriptor.name}: the kernel has no KVM_CAP_EXIT_HYPERCALL for"
                " KVM_HC_MAP_GPA_RANGE",
            )
        argument = KvmEnableCap(cap=Capability.KVM_CAP_EXIT_HYPERCALL)
        argument.args[0] = bit
        self._descriptor.call(KVM_ENABLE_CAP, "KVM_ENABLE_CAP KVM_CAP_EXIT_HYPERCALL", argument)

    def create_vcpu(self, id: int | None = None) -> Vcpu:
        """
        Make a vCPU, in the state of a processor after reset.

        :param id: Unlike that of any vCPU there has been: KVM gives none back. None: the next.
        :raises OSError: EEXIST: there is one; EINVAL: beyond the kernel's limit.
        """
        id = self._next_id if id is None else id
        fd = self._descriptor.call(KVM_CREATE_VCPU, f"vCPU {id}", id)
        self._next_id = max(self._next_id, id + 1)
        vcpu = Vcpu(Descriptor(fd, f"vCPU {id}"), id, run_size=self._run_size, keeps=self._slots)
        self._vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """
        Close it and its vCPUs; one that runs is kicked out first. Twice is the same as once.

        Its guest_memfds stay open.
        """
        while self._vcpus:
            self._vcpus[-1].close()
            self._vcpus.pop()
        self._descriptor.close()

    def __repr__(self) -> str:
        state = "closed" if self._descriptor.closed else f"{len(self._vcpus)} vCPUs"
        return f"<KvmVm {self.type.name}: {state}>"
