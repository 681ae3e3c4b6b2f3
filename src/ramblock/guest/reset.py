# SPDX-License-Identifier: Apache-2.0
"""
The reset of a guest: a reboot, after which nothing of the old guest is left.

Every confidential page is private again, virtio-mem is unplugged, no device maps either, and all that
memory is freed, the guest's old private bytes included. A VMM that recreates its VM or the guest_memfds
(QEMU 11 does both at a confidential reset) hands in the new ones.

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

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from ramblock.discard.attributes import RamBlockAttributes
from ramblock.discard.bitmap_source import BitmapChange
from ramblock.discard.guard import Guard
from ramblock.discard.notification import Notification, reserve
from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.discard.virtio_mem import VirtioMem
from ramblock.errors import UsageError
from ramblock.guest.block import RamBlock
from ramblock.guest.freeing import free_each
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.vm import (
    MAKE_PRIVATE,
    MAKE_SHARED,
    MemorySlots,
    Vm,
    set_attribute,
    withdraw,
)
from ramblock.hostmem.backing import PrivateBacking, check_private

__all__ = ["check_new_parts", "reset_guest"]

_log = logging.getLogger(__name__)


def check_new_parts(
    places: PlaceMap, vm: Vm | None, private: Mapping[RamBlock, PrivateBacking]
) -> None:
    """Raise :class:`UsageError` unless a guest can be reset with *vm* and *private*."""
    if vm is not None and not hasattr(vm, "set_memory_attributes"):
        raise UsageError(f"{vm!r} is not a VM", value=vm, expected="a Vm, or None")
    for block, backing in private.items():
        # Not the block's own word for it: it may be placed in another memory.
        if not places.of_block(block) or block.private is None or block.in_place is not None:
            raise UsageError(
                f"{block!r} takes no new private side",
                value=block,
                expected="a block of this memory with a private side of its own",
            )
        check_private(backing, block.size, block.name)


def reset_guest(
    guard: Guard,
    places: PlaceMap,
    old_vm: Vm | None,
    vm: Vm | None,
    private: Mapping[RamBlock, PrivateBacking],
) -> int:
    """
    Reset; see the module. The caller holds the lock and has checked the new parts.

    :param vm: The new VM; None: it stays.
    :return: Bytes of the old guest that could not be freed.
    :raises BaseException: What a target or VM raised; everything is as before.
    :raises PoisonedError: It could not be put back.
    """
    new_vm = old_vm if vm is None else vm
    renewed = vm is not None
    old_sides = [(block, block.private) for block in private]
    changing = [block for block in _blocks(places) if _resettable(block)]
    farewells = [
        Notification(block.discard_manager, 0, block.size, populate=False) for block in changing
    ]
    reserve(farewells)
    flips: list[BitmapChange] = []
    with UndoLog(guard, "reset") as undo:
        for block, farewell in zip(changing, farewells, strict=True):
            undo.do("unmap", farewell.tell, farewell.take_back, piece=block)
        # Slots of the old VM need no care where it is replaced: it does not run any more.
        again = [place for place in places if renewed or place.block in private]
        for place in [] if renewed else again:
            unmapped = farewells[changing.index(place.block)]
            reason = "unmapped, and the VM does not take it back"
            stuck = partial(unmapped.doubt, reason)
            _do_slot(undo, old_vm, place, add=False, stuck=stuck)
        for block, backing in private.items():
            undo.do(
                "private side",
                partial(setattr, block, "private", backing),
                partial(setattr, block, "private", block.private),
                piece=block,
            )
        # From here on, if an undo fails the pages stay private and unmapped: so the states say.
        for place in places:
            if place.block.attributes is not None:
                # One of a new VM goes back to the kernel's default. Whoever has that VM drops it,
                # so that it does no harm if that fails.
                new = renewed and place.block.in_place is None
                back = partial(
                    withdraw if new else _share_again, new_vm, place.block, place.section
                )
                undo.do(
                    "attribute",
                    partial(_make_private, new_vm, place.block, place.section),
                    partial(_try_to, back) if new else back,
                    piece=place.block,
                    stuck=partial(_settle, place.block),
                )
        for place in again:
            settle = None if renewed else partial(_settle, place.block)
            _do_slot(undo, new_vm, place, add=True, stuck=settle)
        for block in changing:
            for change in _changes(block):
                settle = partial(_settle, block)
                undo.do("state", change.flip, change.flip_back, piece=block, stuck=settle)
                flips.append(change)
    for change in flips:
        if isinstance(change.source, RamBlockAttributes):
            change.source.observe(change, 0, change.source.block.size)
    frees = [partial(block.sides.both.free, 0, block.size) for block in changing]
    for block, old in old_sides:
        if old is not None and old is not block.private:
            frees.append(partial(block.retire_private, old))
    return free_each(frees)


def _blocks(places: PlaceMap) -> list[RamBlock]:
    return list({id(place.block): place.block for place in places}.values())


def _resettable(block: RamBlock) -> list[RamBlockAttributes | VirtioMem]:
    """List the sources of *block* that a reset changes; somebody else's has its own reset."""
    return [
        source
        for source in block.discard_manager.sources
        if isinstance(source, (RamBlockAttributes, VirtioMem))
    ]


def _changes(block: RamBlock) -> Iterator[BitmapChange]:
    for source in _resettable(block):
        change = source.plan(0, block.size, populate=False)
        if change is not None:
            yield change


def _settle(block: RamBlock) -> None:
    for change in _changes(block):
        change.flip()


def _make_private(vm: Vm | None, block: RamBlock, section: RamSection) -> None:
    set_attribute(vm, block, section, section.offset, section.end, private=MAKE_PRIVATE)


def _share_again(vm: Vm | None, block: RamBlock, section: RamSection) -> None:
    assert block.attributes is not None
    for offset, size in block.attributes.ranges(section.offset, section.size):
        set_attribute(vm, block, section, offset, offset + size, private=MAKE_SHARED)


def _try_to(undo: Callable[[], None]) -> None:
    try:
        undo()
    except Exception as error:
        _log.warning("a new VM that is not taken over was not put back: %s", error)


def _do_slot(
    undo: UndoLog, vm: object, place: Place, *, add: bool, stuck: Callable[[], None] | None
) -> None:
    if isinstance(vm, MemorySlots):
        calls = [vm.add_memory_slot, vm.remove_memory_slot]
        do, put_back = (partial(call, place.section) for call in (calls if add else calls[::-1]))
        try:
            if stuck is None:
                put_back = partial(_try_to, put_back)
            undo.do("slot", do, put_back, piece=place.block, stuck=stuck)
        except Exception:
            undo.drop_last()  # a refusal: the VM did nothing
            raise
