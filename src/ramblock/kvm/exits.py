# SPDX-License-Identifier: Apache-2.0
"""Exits of a vCPU as frozen values (Documentation/virt/kvm/api.rst, "The kvm_run structure")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = [
    "EHWPOISON",
    "Exit",
    "FailEntryExit",
    "HaltExit",
    "HypercallExit",
    "InternalErrorExit",
    "InterruptedExit",
    "IoExit",
    "MemoryFaultExit",
    "MmioExit",
    "ShutdownExit",
    "UnknownExit",
]


#: include/uapi/asm-generic/errno.h; the errno module has it only from Python 3.14 on.
EHWPOISON: Final = 133


@dataclass(frozen=True, slots=True, kw_only=True)
class IoExit:
    """Port I/O. A read is answered by :meth:`Vcpu.complete_io` with ``size * count`` bytes."""

    port: int
    size: int
    """Of one access, in bytes: 1, 2 or 4."""
    count: int
    """How many accesses (``rep outs``, ``rep ins``)."""
    write: bool
    data: bytes
    """The data written, ``size * count`` bytes; empty for a read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MmioExit:
    """
    An access where no memory slot is.

    A read is answered by :meth:`Vcpu.complete_io` with ``size`` bytes.
    """

    gpa: int
    size: int
    """In bytes, at most 8."""
    write: bool
    data: bytes
    """The data written; empty for a read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HypercallExit:
    """
    A hypercall for user space.

    Answered by :meth:`Vcpu.set_hypercall_result`; refused if nobody does.
    """

    nr: int
    args: tuple[int, int, int, int, int, int]
    """The guest's registers, unchecked."""
    long_mode: bool
    """Whether it was made in 64-bit mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFaultExit:
    """
    An access that KVM could not resolve, for instance to a private page as if it were shared.

    Alone among the exits it comes with an errno: KVM_RUN fails with EFAULT or EHWPOISON.
    """

    gpa: int
    size: int
    """In bytes."""
    flags: int
    """``MemoryFaultFlags``, and maybe bits that nobody knows yet."""
    errno: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltExit:
    """The guest executed HLT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownExit:
    """A triple fault, usually."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalErrorExit:
    """KVM gave up, for instance because it could not emulate an instruction."""

    suberror: int
    """``ramblock.uapi.kvm.InternalError``."""
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailEntryExit:
    """The processor refused the state of the guest."""

    reason: int
    """As the hardware numbers them."""
    cpu: int
    """The host's CPU that refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterruptedExit:
    """A kick or a signal; running again goes on where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownExit:
    """Something that is not told apart here."""

    reason: int
    """``kvm_run.exit_reason``."""


Exit: TypeAlias = (
    IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | HaltExit
    | ShutdownExit
    | InternalErrorExit
    | FailEntryExit
    | InterruptedExit
    | UnknownExit
)
