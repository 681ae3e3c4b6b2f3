# SPDX-License-Identifier: Apache-2.0
"""
The kernel's KVM: VMs with private pages, guest_memfd, vCPUs and their exits, answers to guests.

A :class:`KvmVm` is the ``vm`` of a :class:`~ramblock.GuestMemory`, a :class:`GuestMemfd` the
``private`` of a :class:`~ramblock.RamBlock`, and :class:`GuestConversions` turns the exits of a
:class:`Vcpu` into conversions.
"""

from ramblock.kvm.conversions import GuestConversions
from ramblock.kvm.cpuid import CpuidTable
from ramblock.kvm.exits import (
    Exit,
    FailEntryExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    UnknownExit,
)
from ramblock.kvm.faults import StuckGuestError, StuckReason
from ramblock.kvm.guest_memfd import GuestMemfd
from ramblock.kvm.hypercall import HypercallResult, MapGpaRange
from ramblock.kvm.in_place import has_in_place_conversion
from ramblock.kvm.system import Kvm
from ramblock.kvm.vcpu import Vcpu
from ramblock.kvm.vm import KvmVm, VmType
from ramblock.uapi.kvm import Capability, GuestMemfdFlags, KvmRegs, KvmSregs, MemoryAttributes

__all__ = [
    "Capability",
    "CpuidTable",
    "Exit",
    "FailEntryExit",
    "GuestConversions",
    "GuestMemfd",
    "GuestMemfdFlags",
    "HaltExit",
    "HypercallExit",
    "HypercallResult",
    "InternalErrorExit",
    "InterruptedExit",
    "IoExit",
    "Kvm",
    "KvmRegs",
    "KvmSregs",
    "KvmVm",
    "MapGpaRange",
    "MemoryAttributes",
    "MemoryFaultExit",
    "MmioExit",
    "ShutdownExit",
    "StuckGuestError",
    "StuckReason",
    "UnknownExit",
    "Vcpu",
    "VmType",
    "has_in_place_conversion",
]
