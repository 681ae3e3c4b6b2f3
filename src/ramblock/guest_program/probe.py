# SPDX-License-Identifier: Apache-2.0
"""The instruction that a guest can ask with on this host: KVM tells it, no guest tries it."""

from __future__ import annotations

from ramblock.guest_program.program import ConversionCall
from ramblock.kvm import CpuidTable, Kvm, MemoryAttributes
from ramblock.uapi.kvm_para import KVM_HC_MAP_GPA_RANGE

__all__ = ["choose_call"]

# CPUID leaf 0: EBX, EDX, ECX. Hygon's processors are AMD's.
_WITH_VMMCALL = frozenset({b"AuthenticAMD", b"HygonGenuine"})


def choose_call(kvm: Kvm) -> ConversionCall:
    """
    Choose the instruction.

    A hypercall needs an exit for it, and a kernel that knows private pages. The second may seem to
    be too much: but where KVM runs without hardware support (kvm-pvm) it offers the exit, and a
    guest that executes VMCALL never comes back.
    """
    has_exit = bool(kvm.exit_hypercall & 1 << KVM_HC_MAP_GPA_RANGE)
    has_attributes = MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE in kvm.memory_attributes
    if not (has_exit and has_attributes):
        return ConversionCall.DOORBELL
    vendor = read_vendor(kvm.supported_cpuid())
    return ConversionCall.VMMCALL if vendor in _WITH_VMMCALL else ConversionCall.VMCALL


def read_vendor(table: CpuidTable) -> bytes:
    """Read the twelve letters of the CPU's maker; nothing where the table does not say."""
    for entry in table.entries[: table.header.nent]:
        if entry.function == 0:
            words: tuple[int, ...] = (entry.ebx, entry.edx, entry.ecx)
            return b"".join(word.to_bytes(4, "little") for word in words)
    return b""
