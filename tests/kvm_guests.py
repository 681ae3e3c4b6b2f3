"""
Guests of a few instructions, for tests of KVM itself: flat 32-bit code, put together from single
instructions.

Port I/O with EAX is how they talk. None of it makes a hypercall, except where a test says so: there
are hosts on which the instruction hangs.
"""

import struct

from ramblock import RamBlock
from ramblock.kvm import Exit, InterruptedExit, IoExit, KvmRegs, Vcpu
from ramblock.uapi.kvm import KvmSegment

__all__ = [
    "HALT",
    "VMMCALL",
    "enter_flat_32bit",
    "jump_back",
    "load",
    "move",
    "read_port",
    "run_through",
    "store",
    "write_code",
    "write_port",
    "written",
]

HALT = b"\xf4"
VMMCALL = b"\x0f\x01\xd9"

_EAX = 0
_NUMBERS = {"eax": _EAX, "ecx": 1, "edx": 2, "ebx": 3}

# Intel SDM, volume 3, 3.4.5.1: code, execute and read, accessed; data, read and write, accessed.
_CODE, _DATA = 11, 3
_CR0_PROTECTED = 1 << 0
_RFLAGS = 1 << 1  # always set


def move(register: str, value: int) -> bytes:
    """MOV register, value."""
    return struct.pack("<BI", 0xB8 + _NUMBERS[register], value)


def load(address: int) -> bytes:
    """MOV EAX, [address]."""
    return struct.pack("<BI", 0xA1, address)


def store(address: int) -> bytes:
    """MOV [address], EAX."""
    return struct.pack("<BI", 0xA3, address)


def read_port(port: int) -> bytes:
    """IN EAX, port."""
    return bytes((0xE5, port))


def write_port(port: int) -> bytes:
    """OUT port, EAX."""
    return bytes((0xE7, port))


def jump_back(size: int) -> bytes:
    """JMP to *size* bytes before this instruction."""
    return struct.pack("<Bb", 0xEB, -size - 2)


def _flat(kind: int, selector: int) -> KvmSegment:
    return KvmSegment(limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)


def enter_flat_32bit(vcpu: Vcpu, entry: int) -> None:
    """
    Protected mode, flat segments, no paging, no stack, no interrupts.

    The next run begins at *entry*.
    """
    special = vcpu.special_registers
    special.cs = _flat(_CODE, 0x08)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(special, name, _flat(_DATA, 0x10))
    special.cr0 |= _CR0_PROTECTED
    vcpu.special_registers = special
    vcpu.registers = KvmRegs(rip=entry, rflags=_RFLAGS)


def write_code(block: RamBlock, offset: int, *instructions: bytes) -> None:
    block.write(offset, b"".join(instructions))


def run_through(vcpu: Vcpu) -> Exit:
    """Run until something happens that is no signal's doing."""
    while True:
        exit = vcpu.run()
        if not isinstance(exit, InterruptedExit):
            return exit


def written(exit: Exit) -> int:
    """What the guest has written to a port."""
    assert isinstance(exit, IoExit), exit
    assert exit.write, exit
    return int.from_bytes(exit.data, "little")
