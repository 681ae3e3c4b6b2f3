# SPDX-License-Identifier: Apache-2.0
"""The answers of the CPUID instruction in a vCPU."""

from __future__ import annotations

import ctypes

from ramblock.kvm.descriptor import Descriptor
from ramblock.uapi.kvm import KVM_GET_SUPPORTED_CPUID, KvmCpuid2, KvmCpuidEntry2

__all__ = ["CpuidTable", "read_supported"]

# KVM_MAX_CPUID_ENTRIES, arch/x86/include/asm/kvm_host.h: KVM has room for no more.
_MAX_ENTRIES = 256


class CpuidTable(ctypes.Structure):
    """
    ``struct kvm_cpuid2`` with room for all that there can be.

    ``entries[:header.nent]`` count.
    """

    _fields_ = (("header", KvmCpuid2), ("entries", KvmCpuidEntry2 * _MAX_ENTRIES))
    header: KvmCpuid2
    entries: ctypes.Array[KvmCpuidEntry2]


def read_supported(system: Descriptor) -> CpuidTable:
    """Ask /dev/kvm for the entries that this host supports."""
    table = CpuidTable(header=KvmCpuid2(nent=_MAX_ENTRIES))
    system.call(KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", table)
    return table
