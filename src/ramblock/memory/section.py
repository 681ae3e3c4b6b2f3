# SPDX-License-Identifier: Apache-2.0
"""A part of a block, with the guest physical address where it appears (QEMU: MemoryRegionSection)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ramblock.errors import describe_range
from ramblock.units import ADDRESS_LIMIT, check_range

if TYPE_CHECKING:
    from ramblock.memory.block import RamBlock

__all__ = ["RamSection"]


@dataclass(frozen=True, slots=True)
class RamSection:
    """
    A part of a block and its place in the guest.

    :raises UsageError: It does not lie inside the block, or its addresses go past 2**64.
    """

    block: RamBlock
    offset: int
    """First byte inside the block."""
    size: int
    """In bytes."""
    gpa: int = 0
    """Guest physical address of its first byte."""
    readonly: bool = False
    """Devices may not write to it (a ROM)."""

    def __post_init__(self) -> None:
        check_range(
            self.offset,
            self.size,
            limit=self.block.size,
            align=1,
            what=f"section of {self.block.name!r}",
        )
        check_range(
            self.gpa, self.size, limit=ADDRESS_LIMIT, align=1, what="guest addresses of a section"
        )

    @property
    def end(self) -> int:
        """First byte of the block behind it."""
        return self.offset + self.size

    @property
    def gpa_end(self) -> int:
        """First guest physical address behind it."""
        return self.gpa + self.size

    def part(self, start: int, end: int) -> RamSection:
        """
        Cut out the bytes ``[start, end)`` of the block, with the guest address moved along.

        The caller has clipped the range to this section.
        """
        # Without the checks of a new section, which a part of a checked one passes: they are a fifth of a 4 KiB state
        # change, and a part is made for every run that a listener hears of.
        part = object.__new__(RamSection)
        _fill_block(part, self.block)
        _fill_offset(part, start)
        _fill_size(part, end - start)
        _fill_gpa(part, self.gpa + start - self.offset)
        _fill_readonly(part, self.readonly)
        return part

    def __repr__(self) -> str:
        inside = describe_range(self.offset, self.size)
        return f"<RamSection {self.block.name!r} {inside} at {describe_range(self.gpa, self.size)}>"


# The slots themselves: two thirds of what object.__setattr__ takes to find them.
_fill_block, _fill_offset, _fill_size, _fill_gpa, _fill_readonly = (
    getattr(RamSection, name).__set__ for name in RamSection.__slots__
)
