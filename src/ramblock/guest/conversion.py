# SPDX-License-Identifier: Apache-2.0
"""
The conversion of guest pages: its steps, their order and their undo, as data.

Theory of operation. A conversion is cut into pieces, one for each section it touches, and two
tables say how they change. To private, every device loses its mapping before the guest's attribute
changes; to shared, the attribute changes before any device gains one. So at no instant, in neither
direction nor in the undo of either, is a page mapped whose attribute is private. The last step
flips the page states; when it is done for all pieces the conversion is committed. Only then is the
side freed that is no longer used. That cannot be undone, and is not.

::

    to private                      to shared
      unmap      <-> map again        attribute  <-> set back
      attribute  <-> set back         map        <-> unmap again
      state      <-> flip back        state      <-> flip back
      --- committed ---               --- committed ---
      free the shared side            free the private side

In place, one memory serves both states: there is nothing to free, and the attribute is the memory's
own (guest/vm.py). The order is the same, and here it cannot be otherwise: a page that is still
mapped for a device cannot become private.

QEMU (kvm_convert_memory(), accel/kvm/kvm-all.c) sets the attribute first in both directions, puts
nothing back, and handles one block. The undo runs the right-hand column from below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from ramblock.discard.attributes import PageState, RamBlockAttributes
from ramblock.discard.bitmap_source import BitmapChange
from ramblock.discard.guard import Guard
from ramblock.discard.notification import reserve
from ramblock.discard.undo import Entry, put_back
from ramblock.errors import ConversionError, PoisonedError, UsageError, describe_range
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.vm import Vm, set_attribute
from ramblock.units import new_tuple


class ConversionResult(NamedTuple):
    """The account of one conversion."""

    gpa: int  #: Start of the range, in guest physical bytes.
    size: int  #: In bytes.
    to: PageState  #: The state that all of it is in now.
    changed_bytes: int  #: How much of it was in the other state.
    map_calls: int  #: Calls to DMA targets, all of them together.
    unmap_calls: int  #: Calls to DMA targets, all of them together.
    #: How much of the side that is no longer used is not freed yet; it is freed later.
    not_freed_bytes: int


class ConversionPiece(NamedTuple):
    """The part of a conversion that lies in one section, where something changes."""

    place: Place
    start: int  #: First byte of it in the block.
    end: int  #: First byte behind it.
    attributes: RamBlockAttributes
    change: BitmapChange
    vm: Vm | None

    def set_attribute(self) -> None:
        """Set the attribute of the whole piece: one call, which changes nothing where it is set."""
        if self.vm is not None or self.place.block.in_place is not None:
            private = not self.change.populate
            set_attribute(self.vm, self.place, self.start, self.end, private=private)

    def put_attribute_back(self) -> None:
        """Undo :meth:`set_attribute`, however far it came: only where it differed."""
        for start, end in self.change.changed_runs():
            set_attribute(self.vm, self.place, start, end, private=self.change.populate)

    def settle_in_doubt(self) -> None:
        """Call the pages shared, which some listeners hold and others were told to let go of."""
        self.change.notification.doubt("could not be unmapped everywhere")
        self.change.flip()

    def free(self) -> int:
        """Free the side that is no longer used; return the bytes that are not freed."""
        sides = self.place.block.sides
        used, unused = sides.private, sides.shared
        if self.change.populate:
            used, unused = unused, used
        if used is None or unused is None:
            return 0  # in place, the page stays in use
        size = self.end - self.start
        used.keep_used(self.start, size)
        return unused.free(self.start, size)


_Call: TypeAlias = Callable[[ConversionPiece], None]
# Name, do, undo; a function called when undo failed, so that our records say what is true now.
_Step: TypeAlias = tuple[str, _Call, _Call, _Call | None]

_ATTRIBUTE: tuple[_Call, _Call] = ConversionPiece.set_attribute, ConversionPiece.put_attribute_back
_TELL: tuple[_Call, _Call] = (
    lambda piece: piece.change.notification.tell(),
    lambda piece: piece.change.notification.take_back(),
)
_FLIP: tuple[_Call, _Call] = (lambda it: it.change.flip(), lambda it: it.change.flip_back())

TO_PRIVATE: tuple[_Step, ...] = (
    ("unmap", *_TELL, None),
    # If the attribute cannot be made shared again nothing may be mapped again: the pages are
    # private for every device.
    ("attribute", *_ATTRIBUTE, _FLIP[0]),
    ("state", *_FLIP, _FLIP[0]),
)
TO_SHARED: tuple[_Step, ...] = (
    ("attribute", *_ATTRIBUTE, None),
    # If pages cannot be unmapped again the attribute stays shared, and so does the state.
    ("map", *_TELL, ConversionPiece.settle_in_doubt),
    ("state", *_FLIP, _FLIP[0]),
)


def convert_pieces(
    guard: Guard, places: PlaceMap, vm: Vm | None, gpa: int, size: int, to: PageState
) -> list[ConversionPiece]:
    """Convert, but for freeing, as ``GuestMemory.convert``; return the pieces that changed."""
    pieces = []
    limited = False
    for place, start, end in places.pieces(gpa, size):
        attributes = place.block.attributes
        if attributes is None:
            at = place.section.gpa + start - place.section.offset
            where = f"{describe_range(gpa, size)}: block {place.block.name!r} at {at:#x}"
            text, expected = f"{where} has no private backing", "RAM with private backing"
            raise UsageError(text, value=at, expected=expected, reason="no private side")
        change = attributes.plan(start, end - start, populate=to is PageState.SHARED)
        if change is not None:
            piece = new_tuple(ConversionPiece, (place, start, end, attributes, change, vm))
            pieces.append(piece)
            if place.block.discard_manager.registry.limited:
                limited = True
    if limited:
        reserve([piece.change.notification for piece in pieces])
    begun: list[Entry] = []  # as an UndoLog keeps, without a call for each step
    try:
        # Step by step: all pieces are unmapped before the first attribute changes.
        for step, do, undo, stuck in TO_PRIVATE if to is PageState.PRIVATE else TO_SHARED:
            for piece in pieces:
                begun.append((step, piece, undo, stuck, (piece,)))
                do(piece)
        return pieces
    except BaseException as cause:
        put_back(guard, begun)
        step, failed = begun[-1][:2]
        assert isinstance(failed, ConversionPiece)
        target = failed.change.notification.refused_by
        where = f"conversion of {describe_range(gpa, size)} to {to.value}: step {step!r}"
        if target is not None:
            where += f" on {target!r}"
        if not guard.poisoned and not isinstance(cause, Exception):
            cause.add_note(f"{where} was left by it; nothing has changed")
            raise
        kind, text = ConversionError, f"{where} failed; nothing has changed"
        if guard.poisoned:
            kind, text = PoisonedError, f"{where} failed and could not be put back; see in_doubt()"
        raise kind(text, gpa=gpa, size=size, to=to, step=step, target=target) from cause
