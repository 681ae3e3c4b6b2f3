# SPDX-License-Identifier: Apache-2.0
"""
The reset of a guest: a reboot, after which nothing of the old guest is left.

Every confidential page is private again, virtio-mem is unplugged, no device maps either, and all
that memory is freed, the guest's old private bytes included. A VMM that recreates its VM or the
guest_memfds (QEMU 11 does both at a confidential reset) hands in the new ones.

The steps and their undo, as in a conversion; ordinary RAM stays as it is and stays mapped::

    unmap       <-> map again             everything that will not be populated any more
    slot        <-> add with the old side only where a private side is replaced in the same VM
    attribute   <-> share again           private; in a new VM before it has a slot
    slot        <-> remove                in a new VM all of them
    state       <-> flip back             everything private and unplugged
    --- committed ---
    free both sides

QEMU 11.1.3 leaves bitmap and mappings as they were: a device then reaches pages that the new guest
believes private.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ramblock.discard.attributes import RamBlockAttributes
from ramblock.discard.bitmap_source import BitmapChange
from ramblock.discard.guard import Guard
from ramblock.discard.notification import Notification
from ramblock.discard.undo import UndoLog
from ramblock.discard.virtio_mem import VirtioMem
from ramblock.errors import UsageError
from ramblock.guest.block import RamBlock
from ramblock.guest.places import PlaceMap
from ramblock.guest.vm import Vm, change_slot, make_private, share, try_to, withdraw
from ramblock.hostmem.backing import PrivateBacking, check_private


def reset_guest(
    guard: Guard,
    places: PlaceMap,
    old_vm: Vm | None,
    vm: Vm | None,
    private: Mapping[RamBlock, PrivateBacking],
) -> list[partial[int]]:
    """
    Reset, but for freeing; the caller holds the lock. Raises as ``GuestMemory.reset``.

    :param vm: The new VM; None: it stays.
    :return: Functions that free the memory of the old guest, and return the bytes that are not.
    """
    if vm is not None and not hasattr(vm, "set_memory_attributes"):
        raise UsageError(f"{vm!r} is not a VM", value=vm, expected="a Vm, or None")
    for block, backing in private.items():
        # Not the block's own word for it: it may be placed in another memory.
        if not places.of_block(block) or block.private is None or block.in_place is not None:
            expected = "a block of this memory with a private side of its own"
            text = f"{block!r} takes no new private side"
            raise UsageError(text, value=block, expected=expected)
        check_private(backing, block.size, block.name)
    renewed, new_vm = vm is not None, old_vm if vm is None else vm
    old_sides = [(block, block.private) for block in private]
    blocks = {id(place.block): place.block for place in places}.values()
    farewells = {
        block: Notification(block.discard_manager, 0, block.size, populate=False)
        for block in blocks
        if _resettable(block)
    }
    # No budget is asked: whole blocks are unmapped and put back, so that no mapping is cut.
    flips: list[BitmapChange] = []
    with UndoLog(guard, "reset") as undo:
        for block, farewell in farewells.items():
            undo.do("unmap", farewell.tell, farewell.take_back, piece=block)
        again = [place for place in places if renewed or place.block in private]
        # Slots of the old VM need no care where it is replaced: it does not run any more.
        for place in [] if renewed else again:
            reason = "unmapped, and the VM does not take it back"
            stuck = partial(farewells[place.block].doubt, reason)
            change_slot(undo, old_vm, place, add=False, piece=place.block, stuck=stuck)
        for block, backing in private.items():
            swap = partial(setattr, block, "private")
            new, old = partial(swap, backing), partial(swap, block.private)
            undo.do("private side", new, old, piece=block)
        # From here on, if an undo fails the pages stay private and unmapped: so the states say.
        for place in places:
            block, settle = place.block, partial(_settle, place.block)
            if block.attributes is not None:
                # Those of a new VM go back to the kernel's default.
                fresh = renewed and block.in_place is None
                back = partial(try_to, withdraw) if fresh else share
                undo.do("attribute", make_private, back, new_vm, place, piece=block, stuck=settle)
        for place in again:
            block, settle = place.block, partial(_settle, place.block)
            change_slot(undo, new_vm, place, add=True, piece=block, stuck=settle, dropped=renewed)
        for block in farewells:
            for change in _changes(block):
                settle = partial(_settle, block)
                undo.do("state", change.flip, change.flip_back, piece=block, stuck=settle)
                flips.append(change)
    for change in flips:
        if isinstance(change.source, RamBlockAttributes):
            change.source.observe(change, 0, change.source.block.size)
    frees = [partial(block.sides.free, 0, block.size) for block in farewells]
    for block, side in old_sides:
        if side is not None and side is not block.private:
            frees.append(partial(block.retire_private, side))
    return frees


def _resettable(block: RamBlock) -> list[RamBlockAttributes | VirtioMem]:
    # Somebody else's source has a reset of its own.
    ours = (RamBlockAttributes, VirtioMem)
    return [source for source in block.discard_manager.sources if isinstance(source, ours)]


def _changes(block: RamBlock) -> list[BitmapChange]:
    plans = [source.plan(0, block.size, populate=False) for source in _resettable(block)]
    return [change for change in plans if change is not None]


def _settle(block: RamBlock, *_: object) -> None:
    for change in _changes(block):
        change.flip()
