"""The code as binutils read it, and how the instruction is chosen that asks for conversions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from binutils import disassemble, needs_objdump
from ramblock.guest_program.probe import choose_call
from ramblock.guest_program.program import EXCEPTIONS, PORT_CONVERT, ConversionCall, assemble
from ramblock.kvm import CpuidTable, Kvm, MemoryAttributes
from ramblock.units import PAGE_SIZE

_ASKS = {
    ConversionCall.VMMCALL: "vmmcall",
    ConversionCall.VMCALL: "vmcall",
    ConversionCall.DOORBELL: f"ineax,{PORT_CONVERT:#x}",
}


@pytest.mark.parametrize("call", ConversionCall)
def test_the_code_fits_its_page_and_has_a_handler_for_each_exception(call: ConversionCall) -> None:
    program = assemble(call)
    assert len(program.code) <= PAGE_SIZE
    assert len(program.handlers) == len(set(program.handlers)) == EXCEPTIONS
    assert program.entry < min(program.handlers)
    assert max(program.handlers) < len(program.code)


@needs_objdump
def test_the_ways_of_asking_differ_in_one_instruction() -> None:
    codes = {call: disassemble(assemble(call).code) for call in ConversionCall}
    for call, lines in codes.items():
        assert "(bad)" not in "".join(lines)
        asking = [line for line in lines if line in _ASKS.values()]
        assert asking == [_ASKS[call]]
    shapes = {
        tuple(line.partition("0x")[0] for line in lines if line not in _ASKS.values())
        for lines in codes.values()
    }
    assert len(shapes) == 1


def _kvm(*, exits: int, attributes: MemoryAttributes, vendor: bytes) -> Kvm:
    table = CpuidTable()
    table.header.nent = 2
    table.entries[0].function = 1
    table.entries[1].function = 0
    for name, start in (("ebx", 0), ("edx", 4), ("ecx", 8)):
        word = int.from_bytes(vendor[start : start + 4], "little")
        setattr(table.entries[1], name, word)
    return cast(
        "Kvm",
        SimpleNamespace(
            exit_hypercall=exits, memory_attributes=attributes, supported_cpuid=lambda: table
        ),
    )


_NONE, _PRIVATE = MemoryAttributes(0), MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE


@pytest.mark.parametrize(
    ("exits", "attributes", "vendor", "expected"),
    [
        (1 << 12, _PRIVATE, b"AuthenticAMD", ConversionCall.VMMCALL),
        (1 << 12, _PRIVATE, b"HygonGenuine", ConversionCall.VMMCALL),
        (1 << 12, _PRIVATE, b"GenuineIntel", ConversionCall.VMCALL),
        (0, _PRIVATE, b"AuthenticAMD", ConversionCall.DOORBELL),
        (1 << 11, _PRIVATE, b"AuthenticAMD", ConversionCall.DOORBELL),
        # kvm-pvm has the exit, and a guest that executes the instruction never comes back.
        (1 << 12, _NONE, b"AuthenticAMD", ConversionCall.DOORBELL),
    ],
)
def test_the_instruction_is_chosen_from_what_kvm_says(
    exits: int, attributes: MemoryAttributes, vendor: bytes, expected: ConversionCall
) -> None:
    assert choose_call(_kvm(exits=exits, attributes=attributes, vendor=vendor)) is expected
