# SPDX-License-Identifier: Apache-2.0
"""The program's CPU state: 64-bit mode, flat segments, the image's page tables, no interrupts."""

from __future__ import annotations

from ramblock.guest_program.image import CODE_SELECTOR, DATA_SELECTOR, Image
from ramblock.guest_program.program import MAILBOX, RING
from ramblock.kvm import Vcpu
from ramblock.uapi.kvm import KvmRegs, KvmSegment

__all__ = ["enter_long_mode"]

# AMD64 Architecture Programmer's Manual, volume 2, 3.1: PE, ET, NE and PG; PAE; LME and LMA.
_CR0 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 31
_CR4 = 1 << 5
_EFER = 1 << 8 | 1 << 10
# Code, execute and read, accessed; data, read and write, accessed.
_CODE, _DATA = 11, 3
_RFLAGS = 1 << 1  # always set


def _segment(kind: int, selector: int, *, code: bool) -> KvmSegment:
    return KvmSegment(
        limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, s=1, g=1, l=code, db=not code
    )


def enter_long_mode(vcpu: Vcpu, image: Image) -> None:
    """
    Put *vcpu*, fresh from reset, into 64-bit mode.

    Its next run begins at the program's first instruction.
    """
    special = vcpu.special_registers
    special.cs = _segment(_CODE, CODE_SELECTOR, code=True)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(special, name, _segment(_DATA, DATA_SELECTOR, code=False))
    special.gdt.base, special.gdt.limit = image.gdt, image.gdt_limit
    special.idt.base, special.idt.limit = image.idt, image.idt_limit
    special.cr0, special.cr3, special.cr4, special.efer = _CR0, image.page_table, _CR4, _EFER
    vcpu.special_registers = special
    registers = KvmRegs(rip=image.entry, rsp=image.stack, rflags=_RFLAGS)
    setattr(registers, MAILBOX.name.lower(), image.mailbox)
    setattr(registers, RING.name.lower(), image.ring)
    vcpu.registers = registers
