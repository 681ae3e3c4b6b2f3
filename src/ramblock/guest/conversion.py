# SPDX-License-Identifier: Apache-2.0
"""
The conversion of guest pages: its steps, their order and their undo, as data.

Theory of operation. A conversion is cut into pieces, one per section it touches, and two tables say what happens to
them. To private, every device loses its mapping before the guest's attribute changes; to shared, the attribute changes
before any device gains one. So at no instant, in neither direction nor in the undo of either, is a page mapped whose
attribute is private. The last step flips the page states; when it is done for all pieces the conversion is committed.
Only then is the side that is no longer used freed, which cannot be undone and is not.

::

    to private                      to shared
      unmap      <-> map again        attribute  <-> set back
      attribute  <-> set back         map        <-> unmap again
      account    <-> still in use     account    <-> still in use
      state      <-> flip back        state      <-> flip back
      --- committed ---               --- committed ---
      free the shared side            free the private side

In place, one memory serves both states: there is nothing to account for and nothing to free, and the attribute is the
memory's own (guest/page_attributes.py). The order is the same, and here it cannot be otherwise: a page that is still mapped
for a device cannot become private.

QEMU (kvm_convert_memory(), accel/kvm/kvm-all.c) sets the attribute first in both directions, puts nothing back, and
handles one block. The undo runs the right-hand column from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ramblock.errors import describe_range
from ramblock.guest.page_attributes import set_attribute
from ramblock.guest.vm import Vm
from ramblock.memory.attributes import PageState, RamBlockAttributes
from ramblock.memory.bitmap_source import BitmapChange
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Step

__all__ = ["STEPS", "ConversionPiece", "ConversionResult", "free_unused"]


class ConversionResult(NamedTuple):
    """What a conversion did."""

    gpa: int
    """Start of the range, in guest physical bytes."""
    size: int
    """In bytes."""
    to: PageState
    """The state that all of it is in now."""
    changed_bytes: int
    """How much of it was in the other state."""
    map_calls: int
    """Calls to DMA targets, all of them together."""
    unmap_calls: int
    """Calls to DMA targets, all of them together."""
    not_freed_bytes: int
    """How much of the side that is no longer used is not freed yet; it is freed later."""


class ConversionPiece:
    """The part of a conversion that lies in one section."""

    __slots__ = ("attributes", "change", "section", "to", "unused", "used", "vm")

    def __init__(
        self, section: RamSection, attributes: RamBlockAttributes, to: PageState, vm: Vm
    ) -> None:
        self.section = section
        self.attributes = attributes
        self.to = to
        self.vm = vm
        sides = section.block.sides
        if to is PageState.PRIVATE:
            self.unused, self.used = sides.shared, sides.private
        else:
            self.unused, self.used = sides.private, sides.shared
        self.change: BitmapChange = attributes.plan(section.offset, section.size, to)

    def tell(self) -> None:
        """Unmap, or map, in every target."""
        self.change.tell()

    def take_back(self) -> None:
        """Undo :meth:`tell`."""
        self.change.take_back()

    def set_attribute(self) -> None:
        """Set the attribute of the whole piece: one call, and where it is set already it changes nothing."""
        section = self.section
        set_attribute(
            self.vm, section, section.offset, section.size, private=self.to is PageState.PRIVATE
        )

    def put_attribute_back(self) -> None:
        """Undo :meth:`set_attribute`, however far it came, run by run: only what differed goes back."""
        for offset, size in self.change.changed_runs():
            set_attribute(
                self.vm, self.section, offset, size, private=self.to is not PageState.PRIVATE
            )

    def expect_free(self) -> None:
        """Put what will not be used any more on the account of what is to be freed."""
        self.unused.expect(self.section.offset, self.section.size)

    def unexpect_free(self) -> None:
        """Undo :meth:`expect_free`."""
        self.unused.unexpect(self.section.offset, self.section.size)

    def flip(self) -> None:
        """Change the page states."""
        self.change.flip()

    def flip_back(self) -> None:
        """Undo :meth:`flip`."""
        self.change.flip_back()

    def settle(self) -> None:
        """Make the states what was asked for: the rest of the piece is, and cannot be put back."""
        self.change.settle()

    def settle_in_doubt(self) -> None:
        """:meth:`settle`, where some listeners may hold the pages and the others were told to let go of them."""
        self.change.doubt("could not be unmapped everywhere")
        self.change.settle()

    def free(self) -> int:
        """Free what is no longer used; return the bytes that are not freed."""
        offset, size = self.section.offset, self.section.size
        # Only the side that came into use: the other is on the account, all of it, and to be freed now.
        self.used.keep_used(offset, size)
        return self.unused.free(offset, size)

    def __repr__(self) -> str:
        return f"<ConversionPiece {describe_range(self.section.gpa, self.section.size)} to {self.to.value}>"


_UNMAP = Step("unmap", ConversionPiece.tell, ConversionPiece.take_back)
# When pages cannot be unmapped again the attribute stays shared, and so does the state: that is what is true then.
_MAP = Step(
    "map", ConversionPiece.tell, ConversionPiece.take_back, stuck=ConversionPiece.settle_in_doubt
)
_SHARED = Step("attribute", ConversionPiece.set_attribute, ConversionPiece.put_attribute_back)
# When the attribute cannot be made shared again nothing may be mapped again: the pages are private for every device.
_PRIVATE = replace(_SHARED, stuck=ConversionPiece.settle)
_ACCOUNT = Step("account", ConversionPiece.expect_free, ConversionPiece.unexpect_free)
_STATE = Step(
    "state", ConversionPiece.flip, ConversionPiece.flip_back, stuck=ConversionPiece.settle
)

STEPS = {
    PageState.PRIVATE: (_UNMAP, _PRIVATE, _ACCOUNT, _STATE),
    PageState.SHARED: (_SHARED, _MAP, _ACCOUNT, _STATE),
}


def free_unused(pieces: Sequence[ConversionPiece]) -> int:
    """
    Free what a committed conversion left unused; return the bytes that could not be freed.

    :raises BaseException: Only an interrupt, after all pieces had their turn.
    """
    not_freed = 0
    interrupt: BaseException | None = None
    for piece in pieces:
        try:
            not_freed += piece.free()
        except BaseException as error:  # the pages of the other pieces must not be lost either
            interrupt = error
    if interrupt is not None:
        raise interrupt
    return not_freed
