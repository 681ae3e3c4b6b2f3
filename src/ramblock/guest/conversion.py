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

QEMU (kvm_convert_memory(), accel/kvm/kvm-all.c) sets the attribute first in both directions, puts nothing back, and
handles one block. The undo runs the right-hand column from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ramblock.errors import describe_range
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

    __slots__ = ("attributes", "change", "section", "to", "vm")

    def __init__(
        self, section: RamSection, attributes: RamBlockAttributes, to: PageState, vm: Vm
    ) -> None:
        self.section = section
        self.attributes = attributes
        self.to = to
        self.vm = vm
        self.change: BitmapChange = attributes.plan(section.offset, section.size, to)

    def tell(self) -> None:
        """Unmap, or map, in every target."""
        self.change.tell()

    def take_back(self) -> None:
        """Undo :meth:`tell`."""
        self.change.take_back()

    def set_attribute(self) -> None:
        """Set the attribute of the whole piece: one call, and where it is set already it changes nothing."""
        self.vm.set_memory_attributes(
            self.section.gpa, self.section.size, self.to is PageState.PRIVATE
        )

    def put_attribute_back(self) -> None:
        """Undo :meth:`set_attribute`, run by run: only what differed goes back."""
        for offset, size in self.change.changed_runs():
            gpa = self.section.gpa + offset - self.section.offset
            self.vm.set_memory_attributes(gpa, size, self.to is not PageState.PRIVATE)

    def expect_free(self) -> None:
        """Put the side that will not be used any more on the account of what is to be freed."""
        private = self.to is PageState.SHARED
        section = self.section
        section.block.expect_free(section.offset, section.size, shared=not private, private=private)

    def unexpect_free(self) -> None:
        """Undo :meth:`expect_free`."""
        private = self.to is PageState.SHARED
        section = self.section
        section.block.unexpect_free(
            section.offset, section.size, shared=not private, private=private
        )

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
        """Free the side that is no longer used; return the bytes that are not freed."""
        section = self.section
        block = section.block
        private = self.to is PageState.PRIVATE
        # Only the side that came into use: the other is on the account, all of it, and to be freed now.
        block.keep_used(section.offset, section.size, shared=not private, private=private)
        if private:
            return block.free_shared(section.offset, section.size)
        return block.free_private(section.offset, section.size)

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
