# SPDX-License-Identifier: Apache-2.0
"""
The plug point for a virtual machine, and who holds the attribute of a page, private or shared.

A VM's attributes (KVM_SET_MEMORY_ATTRIBUTES) belong to guest addresses and outlive what is there. Those
of a memory that is converted in place are its own, by offset, and go with it wherever it appears.
Without a VM only the page states track them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ramblock.discard.section import RamSection
from ramblock.guest.block import RamBlock
from ramblock.hostmem.in_place import set_attributes
from ramblock.ranges import Runs, complement

__all__ = [
    "MAKE_PRIVATE",
    "MAKE_SHARED",
    "MemorySlots",
    "Vm",
    "establish",
    "set_attribute",
    "withdraw",
]

#: Values of the last argument of ``set_memory_attributes``.
MAKE_PRIVATE = True
MAKE_SHARED = False


class Vm(Protocol):
    """The page attributes of a VM (KVM_SET_MEMORY_ATTRIBUTES, Documentation/virt/kvm/api.rst, 4.140)."""

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """
        Make ``[gpa, gpa + size)`` private or shared for the guest. Setting what is set already
        changes nothing.

        :raises OSError: Refused; whoever asked puts back what was, since it cannot know.
        """


@runtime_checkable
class MemorySlots(Protocol):
    """
    A VM that also has memory slots, through which the guest sees a section.

    Adding a section that it has changes nothing, nor does removing one that it has not: where a call
    was left by an exception of somebody else's, it is not known which is the case.
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


def set_attribute(
    vm: Vm | None, block: RamBlock, section: RamSection, start: int, end: int, *, private: bool
) -> None:
    """
    Make the bytes [start, end) of *block*, which lie in *section*, private or shared.

    :raises OSError: Refused; part of it may be done.
    """
    if block.in_place is not None:
        set_attributes(block.in_place, start, end - start, private=private)
    elif vm is not None:
        vm.set_memory_attributes(section.gpa + start - section.offset, end - start, private)


def establish(vm: Vm | None, block: RamBlock, section: RamSection) -> None:
    """
    Make the attributes of *section* what the page states say.

    The VM's may be anything before, and nobody sees them yet: all private, then what is shared. Those
    of a memory may be relied on already (another section, a listener), so only what differs changes.
    """
    assert block.attributes is not None
    ranges = block.attributes.ranges(section.offset, section.size)
    shared = [(offset, offset + size) for offset, size in ranges]
    private: Runs = iter(((section.offset, section.end),))
    if block.in_place is not None:
        private = complement(iter(shared), section.offset, section.end)
    for start, end in private:
        set_attribute(vm, block, section, start, end, private=MAKE_PRIVATE)
    for start, end in shared:
        set_attribute(vm, block, section, start, end, private=MAKE_SHARED)


def withdraw(vm: Vm | None, block: RamBlock, section: RamSection) -> None:
    """Leave the VM's attributes where *section* was as the kernel has them at first: shared."""
    if block.in_place is None:
        set_attribute(vm, block, section, section.offset, section.end, private=MAKE_SHARED)
