# SPDX-License-Identifier: Apache-2.0
"""
The guest's code: takes commands from a ring, converts and touches pages, writes results.

Theory of operation. The code is flat and 64-bit: no interrupts, no stack but for exceptions, every
address is a guest physical one (``image.py`` maps them one to one). Where things are comes in
registers (:data:`RING`, :data:`MAILBOX`), so the code runs anywhere. A conversion is asked for with
the registers of KVM_HC_MAP_GPA_RANGE (Documentation/virt/kvm/x86/hypercalls.rst) in any case; only
one instruction differs, :class:`ConversionCall`:

    RAX 12    RBX guest physical address    RCX 4 KiB pages    RDX attributes    answer in RAX

Why not 32-bit: outside 64-bit mode KVM cuts the arguments of a hypercall to 32 bits
(arch/x86/kvm/x86.c, ____kvm_emulate_hypercall()), so a 32-bit guest cannot ask for anything above 4
GiB, where half of our guests' memory is. The host puts the vCPU into 64-bit mode before the first
instruction, so that the code needs no mode switch either.

An exception ends in a write to :data:`PORT_EXCEPTION` with its details in registers: after a triple
fault AMD's KVM has reset the vCPU (shutdown_interception(), arch/x86/kvm/svm/svm.c), and its RIP is
not known any more.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ramblock.guest_program.assembler import Assembler, Condition, Register
from ramblock.guest_program.mailbox import (
    COMMAND_SHIFT,
    RING_COMMANDS,
    Field,
    HeaderField,
    Operation,
    Status,
)
from ramblock.uapi.kvm_para import KVM_HC_MAP_GPA_RANGE

__all__ = [
    "MAILBOX",
    "PORT_CONVERT",
    "PORT_EXCEPTION",
    "PORT_IDLE",
    "RING",
    "ConversionCall",
    "Program",
    "assemble",
]

# Ports that no PC device uses. They fit into the instruction: DX holds an argument of the
# hypercall.
PORT_CONVERT = 0xE0
PORT_IDLE = 0xE1
PORT_EXCEPTION = 0xE2

#: Registers that the host sets before the first instruction.
MAILBOX = Register.R15
RING = Register.R14

_HEAD, _COMMAND, _STATUS = Register.R8, Register.R10, Register.R11
# Exceptions that push an error code: AMD64 Architecture Programmer's Manual, volume 2, 8.2.
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
EXCEPTIONS = 32


class ConversionCall(Enum):
    """The instruction that asks for a conversion."""

    VMMCALL = "vmmcall"
    """AMD's hypercall: KVM_EXIT_HYPERCALL, if the VM has that exit enabled."""
    VMCALL = "vmcall"
    """Intel's."""
    DOORBELL = "doorbell"
    """
    A read from :data:`PORT_CONVERT`: KVM_EXIT_IO on any CPU.

    The value that is read is the answer.
    """


class Program(NamedTuple):
    """The code, to be put anywhere."""

    code: bytes
    entry: int
    """Offset of the first instruction."""
    handlers: tuple[int, ...]
    """Offsets of the handlers of the 32 exceptions."""


def assemble(call: ConversionCall) -> Program:
    """Make the code for one way of asking."""
    code = Assembler()
    _fetch(code)
    _convert(code, call)
    _fill(code)
    _check(code)
    _finish(code)
    _handle_exceptions(code)
    handlers = tuple(code.offset(f"exception {vector}") for vector in range(EXCEPTIONS))
    return Program(code.code(), code.offset("next"), handlers)


def _fetch(code: Assembler) -> None:
    """Take the next command; with none there, tell the host and look again."""
    code.label("next")
    code.load(_HEAD, MAILBOX, HeaderField.HEAD)
    code.load(Register.RAX, MAILBOX, HeaderField.TAIL)
    code.cmp(_HEAD, Register.RAX)
    code.jump_if(Condition.NOT_EQUAL, "work")
    code.write_port(PORT_IDLE)
    code.jump("next")
    code.label("work")
    code.mov(_COMMAND, _HEAD)
    code.and_immediate(_COMMAND, RING_COMMANDS - 1)
    code.shift_left(_COMMAND, COMMAND_SHIFT)
    code.add(_COMMAND, RING)
    code.load(Register.RAX, _COMMAND, Field.OPERATION)
    for operation in Operation:
        code.cmp_immediate(Register.RAX, operation)
        code.jump_if(Condition.EQUAL, operation.name)
    code.label("refuse")
    code.mov_immediate(_STATUS, Status.REFUSED)
    code.jump("finish")


def _convert(code: Assembler, call: ConversionCall) -> None:
    code.label(Operation.CONVERT.name)
    code.load(Register.RBX, _COMMAND, Field.GPA)
    code.load(Register.RCX, _COMMAND, Field.SIZE)
    code.load(Register.RDX, _COMMAND, Field.VALUE)
    code.mov_immediate(Register.RAX, KVM_HC_MAP_GPA_RANGE)
    if call is ConversionCall.VMMCALL:
        code.vmmcall()
    elif call is ConversionCall.VMCALL:
        code.vmcall()
    else:
        code.read_port(PORT_CONVERT)
    code.store(_COMMAND, Field.FOUND, Register.RAX)
    code.jump("done")


def _walk(code: Assembler, name: str) -> None:
    """Begin a loop over words: RSI address, RCX its end, RDX stride, RAX value, RBX its growth."""
    code.label(name)
    code.load(Register.RDX, _COMMAND, Field.STRIDE)
    code.cmp_immediate(Register.RDX, 8)
    code.jump_if(Condition.BELOW, "refuse")  # a stride of 0 would never end
    code.load(Register.RSI, _COMMAND, Field.GPA)
    code.load(Register.RCX, _COMMAND, Field.SIZE)
    code.add(Register.RCX, Register.RSI)
    code.cmp(Register.RSI, Register.RCX)
    code.jump_if(Condition.NOT_BELOW, "refuse")  # empty, or past the end of the address space
    code.load(Register.RAX, _COMMAND, Field.VALUE)
    code.load(Register.RBX, _COMMAND, Field.INCREMENT)
    code.label(f"{name} word")


def _step(code: Assembler, name: str) -> None:
    code.add(Register.RAX, Register.RBX)
    code.add(Register.RSI, Register.RDX)
    code.cmp(Register.RSI, Register.RCX)
    code.jump_if(Condition.BELOW, f"{name} word")
    code.jump("done")


def _fill(code: Assembler) -> None:
    name = Operation.FILL.name
    _walk(code, name)
    code.store(Register.RSI, 0, Register.RAX)
    _step(code, name)


def _check(code: Assembler) -> None:
    name = Operation.CHECK.name
    _walk(code, name)
    code.load(Register.RDI, Register.RSI, 0)
    code.cmp(Register.RDI, Register.RAX)
    code.jump_if(Condition.NOT_EQUAL, "mismatch")
    _step(code, name)
    code.label("mismatch")
    code.store(_COMMAND, Field.FOUND, Register.RDI)
    code.store(_COMMAND, Field.ADDRESS, Register.RSI)
    code.mov_immediate(_STATUS, Status.MISMATCH)
    code.jump("finish")


def _finish(code: Assembler) -> None:
    code.label("done")
    code.mov_immediate(_STATUS, Status.DONE)
    code.label("finish")
    code.store(_COMMAND, Field.STATUS, _STATUS)
    code.add_immediate(_HEAD, 1)
    code.store(MAILBOX, HeaderField.HEAD, _HEAD)
    code.jump("next")


def _handle_exceptions(code: Assembler) -> None:
    for vector in range(EXCEPTIONS):
        code.label(f"exception {vector}")
        if vector not in _WITH_ERROR_CODE:
            code.push_immediate(0)
        code.push_immediate(vector)
        code.jump("exception")
    code.label("exception")
    code.pop(Register.RAX)  # the vector
    code.pop(Register.RBX)  # the error code
    code.pop(Register.RCX)  # RIP
    code.load_cr2(Register.RDX)
    code.label("tell")
    code.write_port(PORT_EXCEPTION)
    code.jump("tell")
