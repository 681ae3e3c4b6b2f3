# SPDX-License-Identifier: Apache-2.0
"""
KVM on x86 (include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h).

A structure without ``C_NAME`` has no name in C either: it is the type of one member, checked member
by member below it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum, IntFlag
from typing import Final

from ramblock.uapi.ioctl import io, ior, iow, iowr

HEADER: Final = "linux/kvm.h"

KVM_API_VERSION: Final = 12


class Capability(IntEnum):
    """Arguments of KVM_CHECK_EXTENSION, those that we use."""

    KVM_CAP_NR_VCPUS = 9
    KVM_CAP_NR_MEMSLOTS = 10
    KVM_CAP_MAX_VCPUS = 66
    KVM_CAP_READONLY_MEM = 81
    KVM_CAP_ENABLE_CAP_VM = 98
    KVM_CAP_CHECK_EXTENSION_VM = 105
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_EXIT_HYPERCALL = 201
    KVM_CAP_USER_MEMORY2 = 231
    KVM_CAP_MEMORY_FAULT_INFO = 232
    KVM_CAP_MEMORY_ATTRIBUTES = 233
    KVM_CAP_GUEST_MEMFD = 234
    KVM_CAP_VM_TYPES = 235
    KVM_CAP_PRE_FAULT_MEMORY = 236
    KVM_CAP_GUEST_MEMFD_FLAGS = 244


class VmTypeNumber(IntEnum):
    """
    Argument of KVM_CREATE_VM, and bit numbers in KVM_CAP_VM_TYPES.

    The types that need no special hardware.
    """

    KVM_X86_DEFAULT_VM = 0
    KVM_X86_SW_PROTECTED_VM = 1


class ExitReason(IntEnum):
    """``kvm_run.exit_reason``, as far as we tell them apart."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_MEMORY_FAULT = 39


KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1


class InternalError(IntEnum):
    """``kvm_run.internal.suberror``."""

    KVM_INTERNAL_ERROR_EMULATION = 1
    KVM_INTERNAL_ERROR_SIMUL_EX = 2
    KVM_INTERNAL_ERROR_DELIVERY_EV = 3
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class MemoryRegionFlags(IntFlag):
    """``kvm_userspace_memory_region.flags``."""

    KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
    KVM_MEM_READONLY = 1 << 1
    KVM_MEM_GUEST_MEMFD = 1 << 2


class MemoryAttributes(IntFlag):
    """``kvm_memory_attributes.attributes``."""

    KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


class MemoryFaultFlags(IntFlag):
    """``kvm_run.memory_fault.flags``."""

    KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3


class GuestMemfdFlags(IntFlag):
    """``kvm_create_guest_memfd.flags``."""

    GUEST_MEMFD_FLAG_MMAP = 1 << 0
    GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """A memory slot; size 0 deletes it."""

    C_NAME = "struct kvm_userspace_memory_region"
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int


class KvmUserspaceMemoryRegion2(ctypes.Structure):
    """A memory slot with a private side."""

    C_NAME = "struct kvm_userspace_memory_region2"
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
        ("guest_memfd_offset", c_uint64),
        ("guest_memfd", c_uint32),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    )
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    guest_memfd_offset: int
    guest_memfd: int


class KvmMemoryAttributes(ctypes.Structure):
    """Argument of KVM_SET_MEMORY_ATTRIBUTES; address and size in bytes."""

    C_NAME = "struct kvm_memory_attributes"
    _fields_ = (
        ("address", c_uint64),
        ("size", c_uint64),
        ("attributes", c_uint64),
        ("flags", c_uint64),
    )
    address: int
    size: int
    attributes: int
    flags: int


class KvmCreateGuestMemfd(ctypes.Structure):
    """Argument of KVM_CREATE_GUEST_MEMFD; size in bytes."""

    C_NAME = "struct kvm_create_guest_memfd"
    _fields_ = (("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6))
    size: int
    flags: int


class KvmEnableCap(ctypes.Structure):
    """Argument of KVM_ENABLE_CAP."""

    C_NAME = "struct kvm_enable_cap"
    _fields_ = (
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    )
    cap: int
    flags: int
    args: ctypes.Array[c_uint64]


class KvmSignalMask(ctypes.Structure):
    """Argument of KVM_SET_SIGNAL_MASK; *len* bytes of signal mask follow."""

    C_NAME = "struct kvm_signal_mask"
    _fields_ = (("len", c_uint32),)
    len: int


class KvmCpuidEntry2(ctypes.Structure):
    """The answer of CPUID to one function and index."""

    C_NAME = "struct kvm_cpuid_entry2"
    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class KvmCpuid2(ctypes.Structure):
    """*nent* entries follow."""

    C_NAME = "struct kvm_cpuid2"
    _fields_ = (("nent", c_uint32), ("padding", c_uint32))
    nent: int


class KvmRegs(ctypes.Structure):
    """General purpose registers."""

    C_NAME = "struct kvm_regs"
    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    )
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class KvmSegment(ctypes.Structure):
    """One segment register, with the CPU's copy of its descriptor."""

    C_NAME = "struct kvm_segment"
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the kernel's name
    g: int
    avl: int
    unusable: int


class KvmDtable(ctypes.Structure):
    """A descriptor table register."""

    C_NAME = "struct kvm_dtable"
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))
    base: int
    limit: int


class KvmSregs(ctypes.Structure):
    """Special registers."""

    C_NAME = "struct kvm_sregs"
    _fields_ = (
        *((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, KvmDtable) for name in ("gdt", "idt")),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )
    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


class _FailEntry(ctypes.Structure):
    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))
    hardware_entry_failure_reason: int
    cpu: int


class _Hardware(ctypes.Structure):
    _fields_ = (("hardware_exit_reason", c_uint64),)
    hardware_exit_reason: int


class _Io(ctypes.Structure):
    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )
    direction: int
    size: int
    port: int
    count: int
    data_offset: int


class _Mmio(ctypes.Structure):
    _fields_ = (
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    )
    phys_addr: int
    data: ctypes.Array[c_uint8]
    len: int
    is_write: int


class _Hypercall(ctypes.Structure):
    _fields_ = (
        ("nr", c_uint64),
        ("args", c_uint64 * 6),
        ("ret", c_uint64),
        ("flags", c_uint64),
    )
    nr: int
    args: ctypes.Array[c_uint64]
    ret: int
    flags: int


class _Internal(ctypes.Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))
    suberror: int
    ndata: int
    data: ctypes.Array[c_uint64]


class _MemoryFault(ctypes.Structure):
    _fields_ = (("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64))
    flags: int
    gpa: int
    size: int


class _Exit(ctypes.Union):
    _fields_ = (
        ("hw", _Hardware),
        ("fail_entry", _FailEntry),
        ("io", _Io),
        ("mmio", _Mmio),
        ("hypercall", _Hypercall),
        ("internal", _Internal),
        ("memory_fault", _MemoryFault),
        ("padding", c_uint8 * 256),
    )


class KvmRun(ctypes.Structure):
    """The shared structure of a vCPU and its user; the first page of the vCPU's mapping."""

    C_NAME = "struct kvm_run"
    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _Exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", c_uint8 * 2048),
    )
    request_interrupt_window: int
    immediate_exit: int
    exit_reason: int
    ready_for_interrupt_injection: int
    if_flag: int
    flags: int
    cr8: int
    apic_base: int
    hw: _Hardware
    fail_entry: _FailEntry
    io: _Io
    mmio: _Mmio
    hypercall: _Hypercall
    internal: _Internal
    memory_fault: _MemoryFault
    kvm_valid_regs: int
    kvm_dirty_regs: int


KVMIO: Final = 0xAE

# /dev/kvm
KVM_GET_API_VERSION: Final = io(KVMIO, 0x00)
KVM_CREATE_VM: Final = io(KVMIO, 0x01)
KVM_CHECK_EXTENSION: Final = io(KVMIO, 0x03)  # a VM, too
KVM_GET_VCPU_MMAP_SIZE: Final = io(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID: Final = iowr(KVMIO, 0x05, KvmCpuid2)
# a VM
KVM_CREATE_VCPU: Final = io(KVMIO, 0x41)
KVM_SET_USER_MEMORY_REGION: Final = iow(KVMIO, 0x46, KvmUserspaceMemoryRegion)
KVM_SET_USER_MEMORY_REGION2: Final = iow(KVMIO, 0x49, KvmUserspaceMemoryRegion2)
KVM_ENABLE_CAP: Final = iow(KVMIO, 0xA3, KvmEnableCap)
KVM_SET_MEMORY_ATTRIBUTES: Final = iow(KVMIO, 0xD2, KvmMemoryAttributes)
KVM_CREATE_GUEST_MEMFD: Final = iowr(KVMIO, 0xD4, KvmCreateGuestMemfd)
# a vCPU
KVM_RUN: Final = io(KVMIO, 0x80)
KVM_GET_REGS: Final = ior(KVMIO, 0x81, KvmRegs)
KVM_SET_REGS: Final = iow(KVMIO, 0x82, KvmRegs)
KVM_GET_SREGS: Final = ior(KVMIO, 0x83, KvmSregs)
KVM_SET_SREGS: Final = iow(KVMIO, 0x84, KvmSregs)
KVM_SET_SIGNAL_MASK: Final = iow(KVMIO, 0x8B, KvmSignalMask)
KVM_SET_CPUID2: Final = iow(KVMIO, 0x90, KvmCpuid2)
