"""
The image: page tables that map one to one, gates that lead to their handlers, and what it refuses.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.errors import UsageError
from ramblock.guest_program.image import CODE_SELECTOR, Image, build_image
from ramblock.guest_program.program import EXCEPTIONS, ConversionCall, assemble
from ramblock.units import GIB, MIB, PAGE_SIZE

PROGRAM = assemble(ConversionCall.DOORBELL)
_PRESENT, _LARGE = 0x1, 0x80
_ADDRESS = (1 << 52) - PAGE_SIZE

gibs = st.integers(0, (1 << 47) // GIB - 3)


def entry(image: Image, base: int, table: int, index: int) -> int:
    value: int = struct.unpack_from("<Q", image.content, table - base + 8 * index)[0]
    return value


def translate(image: Image, base: int, address: int) -> int | None:
    """Walk the tables as a CPU does; None: not present."""
    table = image.page_table
    for shift in (39, 30):
        value = entry(image, base, table, address >> shift & 511)
        if not value & _PRESENT:
            return None
        table = value & _ADDRESS
    value = entry(image, base, table, address >> 21 & 511)
    if not value & _PRESENT:
        return None
    assert value & _LARGE
    return (value & _ADDRESS) + address % (2 * MIB)


@given(
    base=gibs.map(lambda gib: gib * GIB + 3 * PAGE_SIZE),
    reach=st.lists(
        st.tuples(gibs, st.integers(0, GIB // MIB - 1), st.integers(1, 2 * GIB)), max_size=4
    ),
    elsewhere=st.integers(0, (1 << 47) - 1),
)
def test_what_is_to_be_reached_is_mapped_to_itself(
    base: int, reach: list[tuple[int, int, int]], elsewhere: int
) -> None:
    ranges = [(gib * GIB + mib * MIB, size) for gib, mib, size in reach]
    image = build_image(PROGRAM, base, ranges)
    for gpa, size in (*ranges, (base, len(image.content))):
        for address in (gpa, gpa + size // 2, gpa + size - 1):
            assert translate(image, base, address) == address
    assert translate(image, base, elsewhere) in (None, elsewhere)


def test_nothing_else_is_mapped() -> None:
    image = build_image(PROGRAM, 3 * GIB, [(8 * GIB, GIB)])
    assert translate(image, 3 * GIB, 8 * GIB - 1) is None
    assert translate(image, 3 * GIB, 9 * GIB) is None
    assert translate(image, 3 * GIB, 0) is None
    assert translate(image, 3 * GIB, 1 << 40) is None


def test_every_exception_has_its_handler() -> None:
    base = (1 << 40) + GIB
    image = build_image(PROGRAM, base, [])
    for vector in range(EXCEPTIONS):
        low, selector, _, kind, middle, high, _ = struct.unpack_from(
            "<HHBBHII", image.content, image.idt - base + 16 * vector
        )
        handler = low | middle << 16 | high << 32
        assert (selector, kind) == (CODE_SELECTOR, 0x8E)
        assert handler - (image.entry - PROGRAM.entry) == PROGRAM.handlers[vector]
    assert image.idt_limit == 16 * EXCEPTIONS - 1
    assert image.idt - image.gdt > image.gdt_limit


def test_parts_do_not_overlap() -> None:
    image = build_image(PROGRAM, 0, [])
    code = image.entry - PROGRAM.entry
    assert image.content[code : code + len(PROGRAM.code)] == PROGRAM.code
    assert image.idt + image.idt_limit < image.stack - PAGE_SIZE
    assert image.stack <= code
    assert code + len(PROGRAM.code) <= image.mailbox < image.ring < image.page_table


@pytest.mark.parametrize(
    ("base", "reach"),
    [(1 << 47, []), (0, [((1 << 47) - PAGE_SIZE, 2 * PAGE_SIZE)]), (0, [(-1, 2)])],
)
def test_out_of_reach_is_refused(base: int, reach: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="out of the guest program's reach"):
        build_image(PROGRAM, base, reach)
