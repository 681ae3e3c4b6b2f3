# SPDX-License-Identifier: Apache-2.0
"""
KVM: whether there is one, and whether it knows private pages.

Asked of /dev/kvm itself; no VM is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ramblock.doctor.line import Line, Purpose, Status
from ramblock.kvm import Kvm
from ramblock.uapi.kvm import Capability, MemoryAttributes
from ramblock.uapi.kvm_para import KVM_HC_MAP_GPA_RANGE

__all__ = ["look"]

_NEEDED = (Purpose.KVM,)
#: By bit of KVM_CAP_VM_TYPES: KVM_X86_*_VM in arch/x86/include/uapi/asm/kvm.h.
_TYPES = ("default", "software-protected", "SEV", "SEV-ES", "SEV-SNP", "TDX")
_DEFAULT = 0


def look(root: Path) -> Iterator[Line]:
    """Look at KVM."""
    try:
        kvm = Kvm(root / "dev/kvm")
    except OSError as error:
        reason, _, hint = str(error.strerror).partition("; ")
        yield Line(
            name="KVM",
            status=Status.UNSEEN if isinstance(error, PermissionError) else Status.LACKING,
            found=f"/dev/kvm: {reason}",
            why="without KVM there is no confidential guest",
            todo=hint,
            needed_for=_NEEDED,
        )
        return
    with kvm:
        yield Line(
            name="KVM",
            status=Status.GOOD,
            found="/dev/kvm can be used",
            why="without KVM there is no confidential guest",
            needed_for=_NEEDED,
        )
        yield _types(kvm)
        yield _attributes(kvm)
        yield _guest_memfd(kvm)
        yield _hypercalls(kvm)


def _types(kvm: Kvm) -> Line:
    # A kernel without the capability has one type (before Linux 6.8).
    bits = kvm.capability(Capability.KVM_CAP_VM_TYPES) or 1 << _DEFAULT
    numbers = [number for number in range(bits.bit_length()) if bits >> number & 1]
    confidential = [number for number in numbers if number != _DEFAULT]
    return Line(
        name="VM types",
        status=Status.GOOD if confidential else Status.LACKING,
        found=", ".join(
            _TYPES[number] if number < len(_TYPES) else f"type {number}" for number in numbers
        ),
        why="only the others than `default` have private pages; software-protected ones are for"
        " tests, and protect nothing",
        todo=""
        if confidential
        else "TDX or SEV-SNP, switched on in firmware and kernel;"
        " for tests CONFIG_KVM_SW_PROTECTED_VM",
        needed_for=_NEEDED,
    )


def _attributes(kvm: Kvm) -> Line:
    has = bool(kvm.memory_attributes & MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    return Line(
        name="page attributes",
        status=Status.GOOD if has else Status.LACKING,
        found="private" if has else "none",
        why="KVM keeps the host and devices' drivers away from private pages;"
        " without it states are only tracked",
        todo="" if has else "a kernel of 6.8 or newer with a type of VM that has private pages",
        needed_for=_NEEDED,
    )


def _guest_memfd(kvm: Kvm) -> Line:
    has = kvm.has_guest_memfd
    flags = kvm.guest_memfd_flags if has else None
    names = [flag.name.lower() for flag in flags or () if flag.name is not None]
    found = "there" + (f", flags: {', '.join(names)}" if names else "") if has else "not there"
    return Line(
        name="guest_memfd",
        status=Status.GOOD if has else Status.LACKING,
        found=found,
        why="private pages come from it",
        todo="" if has else "a kernel of 6.8 or newer with a type of VM that has private pages",
        needed_for=_NEEDED,
    )


def _hypercalls(kvm: Kvm) -> Line:
    has = bool(kvm.exit_hypercall >> KVM_HC_MAP_GPA_RANGE & 1)
    return Line(
        name="conversion by hypercall",
        status=Status.GOOD if has else Status.LACKING,
        found="KVM_HC_MAP_GPA_RANGE can be handed to user space" if has else "not handed over",
        why="so guests ask for conversions, and the VMM hears of it",
        todo="" if has else "a newer kernel",
        needed_for=_NEEDED,
    )
