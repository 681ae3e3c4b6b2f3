# SPDX-License-Identifier: Apache-2.0
"""
The guest program's memory, one piece of ordinary RAM.

::

    base   GDT, IDT             flat segments; 32 gates to the program's handlers
           stack                one page, for exceptions only
           code                 one page
           mailbox              header and ring
           PML4, PDPTs, PDs     one to one, in pages of 2 MiB, for each GiB that the guest reaches

Pages of 2 MiB and not of 1 GiB: where KVM builds guests from software page tables the larger ones
may be missing (kvm-pvm refuses them), and a page directory of 4 KiB for each GiB costs nothing.
Formats: AMD64 Architecture Programmer's Manual, volume 2, 4.8 and 5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from ramblock.errors import UsageError, describe_range
from ramblock.guest_program.mailbox import MAILBOX_SIZE
from ramblock.guest_program.program import Program
from ramblock.units import GIB, MIB, PAGE_SIZE

__all__ = ["CODE_SELECTOR", "DATA_SELECTOR", "Image", "build_image"]

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10

_DESCRIPTORS, _STACK, _CODE, _MAILBOX = (number * PAGE_SIZE for number in range(4))
_TABLES = _MAILBOX + MAILBOX_SIZE
_IDT = 256  # behind the GDT

_GDT = struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_GATE = struct.Struct("<HHBBHII")
_INTERRUPT_GATE = 0x8E

# Present, writable, user, accessed, dirty: nothing is left for the CPU to write back.
_TABLE = 0x67
_LARGE_PAGE = 0xE7
_ENTRIES = 512
_REACH_LIMIT = 1 << 47  # four levels of page tables, lower half


class Image(NamedTuple):
    """The bytes, and the guest physical addresses that a vCPU needs."""

    content: bytes
    gdt: int
    gdt_limit: int
    idt: int
    idt_limit: int
    stack: int
    """Behind its last byte."""
    entry: int
    mailbox: int
    ring: int
    mailbox_offset: int
    """In the content."""
    page_table: int


def build_image(program: Program, base: int, reach: Iterable[tuple[int, int]]) -> Image:
    """
    Lay the program out.

    :param base: Guest physical address of the memory, a multiple of the page size.
    :param reach: Memory that the guest touches, as (gpa, size) in bytes; the GiBs around it are
        mapped, and the image itself.
    :raises UsageError: Something lies past 2**47, which is as far as the page tables go.
    """
    # The image is far smaller than a GiB, page tables for all there is included: it lies in one or
    # two.
    gibs = {base // GIB, base // GIB + 1}
    for gpa, size in (*reach, (base, GIB)):
        if gpa < 0 or gpa + size > _REACH_LIMIT:
            raise UsageError(
                f"{describe_range(gpa, size)} is out of the guest program's reach",
                value=gpa,
                expected=f"addresses below {_REACH_LIMIT:#x}",
            )
        gibs.update(range(gpa // GIB, -(-(gpa + size) // GIB)))
    content = bytearray(_TABLES)
    content[_DESCRIPTORS : _DESCRIPTORS + len(_GDT)] = _GDT
    code = base + _CODE
    gates = b"".join(_gate(code + handler) for handler in program.handlers)
    content[_IDT : _IDT + len(gates)] = gates
    assert len(program.code) <= PAGE_SIZE
    content[_CODE : _CODE + len(program.code)] = program.code
    content += _page_tables(base + _TABLES, sorted(gibs))
    return Image(
        content=bytes(content),
        gdt=base + _DESCRIPTORS,
        gdt_limit=len(_GDT) - 1,
        idt=base + _IDT,
        idt_limit=len(gates) - 1,
        stack=base + _STACK + PAGE_SIZE,
        entry=code + program.entry,
        mailbox=base + _MAILBOX,
        ring=base + _MAILBOX + PAGE_SIZE,
        mailbox_offset=_MAILBOX,
        page_table=base + _TABLES,
    )


def _gate(handler: int) -> bytes:
    return _GATE.pack(
        handler & 0xFFFF,
        CODE_SELECTOR,
        0,
        _INTERRUPT_GATE,
        handler >> 16 & 0xFFFF,
        handler >> 32,
        0,
    )


def _page_tables(base: int, gibs: list[int]) -> bytes:
    """Map each of *gibs* to itself: a PML4 at *base*, its PDPTs, and a PD for each GiB."""
    roots = sorted({gib // _ENTRIES for gib in gibs})
    pdpts = {root: base + PAGE_SIZE * (1 + number) for number, root in enumerate(roots)}
    first = base + PAGE_SIZE * (1 + len(roots))
    directories = {gib: first + PAGE_SIZE * number for number, gib in enumerate(gibs)}
    pages = [_table({root: address | _TABLE for root, address in pdpts.items()})]
    pages += [
        _table(
            {
                gib % _ENTRIES: address | _TABLE
                for gib, address in directories.items()
                if gib // _ENTRIES == root
            }
        )
        for root in roots
    ]
    pages += [
        _table({index: gib * GIB + index * 2 * MIB | _LARGE_PAGE for index in range(_ENTRIES)})
        for gib in gibs
    ]
    return b"".join(pages)


def _table(entries: dict[int, int]) -> bytes:
    return struct.pack(f"<{_ENTRIES}Q", *(entries.get(index, 0) for index in range(_ENTRIES)))
