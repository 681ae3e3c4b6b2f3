# SPDX-License-Identifier: Apache-2.0
"""
An assembler for the few 64-bit instructions that the guest program is made of.

Theory of operation. Each method appends one instruction, always in one fixed form: 64-bit operands,
a displacement and a jump distance of 32 bits. So an instruction's length is known at once, and one
pass with fixups for labels is enough. Encodings: AMD64 Architecture Programmer's Manual, volume 3
(publication 24594); Intel SDM, volume 2. The tests have GNU binutils read every form back.

Why our own: keystone-engine had its last release in 2020 and iced-x86 in 2024, and both bring more
than a thousand instructions for the dozen here.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from ramblock.errors import UsageError

__all__ = ["Assembler", "Condition", "Register"]


class Register(IntEnum):
    """The 64-bit registers, with the numbers that the encoding uses."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


class Condition(IntEnum):
    """When a conditional jump is taken: the low four bits of its opcode."""

    BELOW = 2
    NOT_BELOW = 3
    EQUAL = 4
    NOT_EQUAL = 5


# In the ModRM byte of the form with an immediate (81 /n).
_ADD_IMMEDIATE, _AND_IMMEDIATE, _CMP_IMMEDIATE = 0, 4, 7
_NEEDS_SIB = 4  # a base of RSP or R12 has to be named by a SIB byte
_REX_W = 0x48


class Assembler:
    """Code that grows by one instruction per call; :meth:`code` resolves the labels."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        # Where a 32-bit distance is to be put, and the label that it leads to. It counts from
        # behind itself.
        self._fixups: list[tuple[int, str]] = []

    def code(self) -> bytes:
        """
        Give the code, labels resolved.

        :raises UsageError: A jump leads to a label that does not exist.
        """
        result = bytearray(self._code)
        for position, name in self._fixups:
            struct.pack_into("<i", result, position, self.offset(name) - position - 4)
        return bytes(result)

    def offset(self, name: str) -> int:
        """
        Tell where label *name* is, in bytes from the start.

        :raises UsageError: There is none of that name.
        """
        if name not in self._labels:
            raise UsageError(f"label {name!r} is nowhere", value=name)
        return self._labels[name]

    def label(self, name: str) -> None:
        """
        Let *name* stand for the next instruction.

        :raises UsageError: It stands for another one already.
        """
        if name in self._labels:
            raise UsageError(f"label {name!r} is there already", value=name)
        self._labels[name] = len(self._code)

    # -- moving data -------------------------------------------------------------------------------

    def mov(self, to: Register, source: Register) -> None:
        """MOV to, source."""
        self._register_form(0x89, source, to)

    def mov_immediate(self, to: Register, value: int) -> None:
        """
        MOV to, value: any 64 bits.

        :raises UsageError: *value* does not fit.
        """
        self._emit(_REX_W | to >> 3, 0xB8 | to & 7, *_packed("<Q", value))

    def load(self, to: Register, base: Register, displacement: int) -> None:
        """MOV to, [base + displacement]."""
        self._memory_form(0x8B, to, base, displacement)

    def store(self, base: Register, displacement: int, source: Register) -> None:
        """MOV [base + displacement], source."""
        self._memory_form(0x89, source, base, displacement)

    def load_cr2(self, to: Register) -> None:
        """MOV to, CR2: the address of the latest page fault."""
        prefix = () if to < Register.R8 else (0x41,)  # the operand is 64 bits wide without REX.W
        self._emit(*prefix, 0x0F, 0x20, 0xC0 | 2 << 3 | to & 7)

    def push_immediate(self, value: int) -> None:
        """PUSH value, sign-extended from 32 bits."""
        self._emit(0x68, *_packed("<i", value))

    def pop(self, to: Register) -> None:
        """POP to."""
        prefix = () if to < Register.R8 else (0x41,)
        self._emit(*prefix, 0x58 | to & 7)

    # -- arithmetic --------------------------------------------------------------------------------

    def add(self, to: Register, source: Register) -> None:
        """ADD to, source."""
        self._register_form(0x01, source, to)

    def add_immediate(self, to: Register, value: int) -> None:
        """ADD to, value, sign-extended from 32 bits."""
        self._immediate_form(_ADD_IMMEDIATE, to, value)

    def and_immediate(self, to: Register, value: int) -> None:
        """AND to, value, sign-extended from 32 bits."""
        self._immediate_form(_AND_IMMEDIATE, to, value)

    def cmp(self, one: Register, other: Register) -> None:
        """CMP one, other: a jump that follows says how *one* relates to *other*."""
        self._register_form(0x39, other, one)

    def cmp_immediate(self, one: Register, value: int) -> None:
        """CMP one, value, sign-extended from 32 bits."""
        self._immediate_form(_CMP_IMMEDIATE, one, value)

    def shift_left(self, to: Register, bits: int) -> None:
        """
        SHL to, bits.

        :raises UsageError: *bits* is not 0 to 63: the CPU would take it modulo 64.
        """
        if not 0 <= bits < 64:
            raise UsageError(f"a shift by {bits} bits", value=bits, expected="0 to 63")
        self._emit(_REX_W | to >> 3, 0xC1, 0xC0 | 4 << 3 | to & 7, bits)

    # -- control -----------------------------------------------------------------------------------

    def jump(self, label: str) -> None:
        """JMP label."""
        self._emit(0xE9)
        self._distance(label)

    def jump_if(self, condition: Condition, label: str) -> None:
        """Jcc label; the comparison is one of unsigned numbers."""
        self._emit(0x0F, 0x80 | condition)
        self._distance(label)

    def read_port(self, port: int) -> None:
        """
        IN EAX, port; the upper half of RAX becomes 0.

        :raises UsageError: *port* is not 0 to 255.
        """
        self._emit(0xE5, *_packed("<B", port))

    def write_port(self, port: int) -> None:
        """
        OUT port, EAX.

        :raises UsageError: *port* is not 0 to 255.
        """
        self._emit(0xE7, *_packed("<B", port))

    def vmcall(self) -> None:
        """VMCALL: Intel's hypercall."""
        self._emit(0x0F, 0x01, 0xC1)

    def vmmcall(self) -> None:
        """VMMCALL: AMD's hypercall."""
        self._emit(0x0F, 0x01, 0xD9)

    # -- forms -------------------------------------------------------------------------------------

    def _emit(self, *values: int) -> None:
        self._code += bytes(values)

    def _register_form(self, opcode: int, register: Register, operand: Register) -> None:
        rex = _REX_W | (register >> 3) << 2 | operand >> 3
        self._emit(rex, opcode, 0xC0 | (register & 7) << 3 | operand & 7)

    def _immediate_form(self, extension: int, operand: Register, value: int) -> None:
        modrm = 0xC0 | extension << 3 | operand & 7
        self._emit(_REX_W | operand >> 3, 0x81, modrm, *_packed("<i", value))

    def _memory_form(
        self, opcode: int, register: Register, base: Register, displacement: int
    ) -> None:
        rex = _REX_W | (register >> 3) << 2 | base >> 3
        modrm = 0x80 | (register & 7) << 3 | base & 7
        sib = (0x24,) if base & 7 == _NEEDS_SIB else ()
        self._emit(rex, opcode, modrm, *sib, *_packed("<i", displacement))

    def _distance(self, label: str) -> None:
        self._fixups.append((len(self._code), label))
        self._emit(0, 0, 0, 0)


def _packed(form: str, value: int) -> bytes:
    try:
        return struct.pack(form, value)
    except struct.error:
        raise UsageError(
            f"{value:#x} does not fit into the instruction",
            value=value,
            expected=f"{8 * struct.calcsize(form)} bits",
        ) from None
