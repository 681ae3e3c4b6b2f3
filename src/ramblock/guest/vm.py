# SPDX-License-Identifier: Apache-2.0
"""
The plug point for a virtual machine, and who holds the attribute of a page, private or shared.

A VM's attributes (KVM_SET_MEMORY_ATTRIBUTES) belong to guest addresses and outlive the memory.
Those of a memory that is converted in place are its own, by offset, and go with it wherever it
appears. Without a VM only the page states track them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.guest.places import Place
from ramblock.hostmem.in_place import set_attributes

_log = logging.getLogger(__name__)

#: Values of the last argument of ``set_memory_attributes``.
MAKE_PRIVATE, MAKE_SHARED = True, False


class Vm(Protocol):
    """A VM's page attributes (KVM_SET_MEMORY_ATTRIBUTES, Documentation/virt/kvm/api.rst, 4.140)."""

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001
        """
        Make ``[gpa, gpa + size)`` private or shared for the guest; no change where it is already.

        :raises OSError: Refused; whoever asked puts all of it back, since it cannot know.
        """


@runtime_checkable
class MemorySlots(Protocol):
    """
    A VM that also has memory slots, through which the guest sees a section.

    Adding a section that it has changes nothing, nor does removing one that it has not: where a
    call was left by an exception of somebody else's, it is not known which is the case.
    """

    def add_memory_slot(self, section: RamSection) -> None:
        """
        Let the guest see *section*, whose private pages ``section.block.private`` serves.

        :raises OSError: Refused: the guest does not see it.
        """

    def remove_memory_slot(self, section: RamSection) -> None:
        """
        Take *section* away from the guest.

        :raises OSError: Refused: the guest still sees it.
        """


def set_attribute(vm: Vm | None, place: Place, start: int, end: int, *, private: bool) -> None:
    """Set the attribute of bytes [start, end) of the block, in *place*; OSError: of a part."""
    if place.block.in_place is not None:
        set_attributes(place.block.in_place, start, end - start, private=private)
    elif vm is not None:
        gpa = place.section.gpa + start - place.section.offset
        vm.set_memory_attributes(gpa, end - start, private)


def make_private(vm: Vm | None, place: Place) -> None:
    """Make all of *place* private."""
    section = place.section
    set_attribute(vm, place, section.offset, section.end, private=MAKE_PRIVATE)


def share(vm: Vm | None, place: Place) -> None:
    """Make the pages of *place* shared whose state is shared."""
    for start, end in place.runs(shared=True):
        set_attribute(vm, place, start, end, private=MAKE_SHARED)


def establish(vm: Vm | None, place: Place) -> None:
    """Make the attributes of *place*, which has private backing, agree with the page states."""
    if place.block.in_place is None:
        # The VM's may be anything before, and nobody sees them yet.
        make_private(vm, place)
    else:
        # Another section or a listener may rely on those of a memory: only the differences change.
        for start, end in place.runs(shared=False):
            set_attribute(vm, place, start, end, private=MAKE_PRIVATE)
    share(vm, place)


def withdraw(vm: Vm | None, place: Place) -> None:
    """Give the VM's attributes of *place* the kernel's default, shared; ordinary RAM has it."""
    # The next block there may be ordinary RAM. In place there are none of the VM.
    if vm is not None and place.block.private is not None and place.block.in_place is None:
        vm.set_memory_attributes(place.section.gpa, place.section.size, MAKE_SHARED)


def change_slot(
    undo: UndoLog,
    vm: object,
    place: Place,
    *,
    add: bool,
    piece: object = None,
    stuck: Callable[[], None] | None = None,
    dropped: bool = False,
) -> None:
    """Show *place* to the guest or hide it, as a step; *dropped*: see :func:`try_to`."""
    if isinstance(vm, MemorySlots):
        adding, removing = vm.add_memory_slot, vm.remove_memory_slot
        do, put_back = (adding, removing) if add else (removing, adding)
        back = partial(put_back, place.section)
        try:
            if dropped:
                back = partial(try_to, back)
            undo.do("slot", partial(do, place.section), back, piece=piece, stuck=stuck)
        except OSError:
            # A refusal: the VM did nothing, and may refuse to undo what it never did.
            undo.drop_last()
            raise


def try_to(undo: Callable[..., None], *arguments: object) -> None:
    """Put back a step in a new VM, which its owner drops now: a failure does no harm."""
    try:
        undo(*arguments)
    except Exception as error:
        _log.warning("a new VM that is not taken over was not put back: %s", error)
