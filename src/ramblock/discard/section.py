# SPDX-License-Identifier: Apache-2.0
"""A part of a block, with the guest address where it appears (QEMU: MemoryRegionSection)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ramblock.errors import describe_range
from ramblock.hostmem.backing import HostMemory, PrivateBacking
from ramblock.units import ADDRESS_LIMIT, check_range


class Block(HostMemory, Protocol):
    """
    All that whoever maps a section needs of its block; ``ramblock.RamBlock`` is one.

    Descriptor and address are those of the shared backing.
    """

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def private(self) -> PrivateBacking | None:
        """The private backing, for a memory slot; None: ordinary RAM."""


@dataclass(frozen=True, slots=True)
class RamSection:
    """
    A part of a block and its place in the guest.

    :raises UsageError: It does not lie inside the block, or its addresses go past 2**64.
    """

    block: Block
    offset: int  #: First byte inside the block.
    size: int  #: In bytes.
    gpa: int = 0  #: Guest physical address of its first byte.
    readonly: bool = False  #: Devices may not write to it (a ROM).

    def __post_init__(self) -> None:
        what = f"section of {self.block.name!r}"
        check_range(self.offset, self.size, limit=self.block.size, align=1, what=what)
        what = "guest addresses of a section"
        check_range(self.gpa, self.size, limit=ADDRESS_LIMIT, align=1, what=what)

    @property
    def end(self) -> int:
        """First byte of the block behind it."""
        return self.offset + self.size

    @property
    def gpa_end(self) -> int:
        """First guest physical address behind it."""
        return self.gpa + self.size

    def intersect(self, offset: int, size: int) -> RamSection | None:
        """
        Cut out the part that lies in ``[offset, offset + size)`` of the block.

        QEMU: memory_region_section_intersect_range().

        :param offset: In bytes of the block, as :attr:`offset`; any alignment.
        :param size: In bytes; 0 meets nothing.
        :return: A section with its guest address moved along; None: they do not meet.
        :raises UsageError: Negative, or not whole numbers.
        """
        if type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
            check_range(offset, size or 1, limit=ADDRESS_LIMIT, align=1, what=f"part of {self!r}")
        start, end = max(offset, self.offset), min(offset + size, self.end)
        return self.part(start, end) if start < end else None

    def part(self, start: int, end: int) -> RamSection:
        """Cut out the bytes ``[start, end)`` of the block, which lie in this section."""
        # Without the checks of a new section, which a part of a checked one passes: they are a
        # fifth of a 4 KiB state change, and a part is made for every run that a listener hears of.
        part = _new(RamSection)
        _set_block(part, self.block)
        _set_offset(part, start)
        _set_size(part, end - start)
        _set_gpa(part, self.gpa + start - self.offset)
        _set_readonly(part, self.readonly)
        return part

    def __repr__(self) -> str:
        inside = describe_range(self.offset, self.size)
        return f"<RamSection {self.block.name!r} {inside} at {describe_range(self.gpa, self.size)}>"


_new = object.__new__
# The slots themselves: a third quicker than object.__setattr__, which has to find them.
_set_block, _set_offset, _set_size, _set_gpa, _set_readonly = (
    getattr(RamSection, name).__set__ for name in RamSection.__slots__
)
