# SPDX-License-Identifier: Apache-2.0
"""
Who holds the attribute of a page, private or shared: the VM, by guest address, or the memory itself, by offset.

A VM's attributes (KVM_SET_MEMORY_ATTRIBUTES) belong to guest addresses and outlive what is there. Those of a memory that is
converted in place go with it, wherever it appears.
"""

from __future__ import annotations

from ramblock.guest.vm import MAKE_PRIVATE, MAKE_SHARED, Vm
from ramblock.memory.attributes import RamBlockAttributes
from ramblock.memory.in_place import set_attributes
from ramblock.memory.runs import Runs, complement
from ramblock.memory.section import RamSection

__all__ = ["establish", "set_attribute", "withdraw"]


def set_attribute(vm: Vm, section: RamSection, offset: int, size: int, *, private: bool) -> None:
    """
    Make ``[offset, offset + size)`` of the block, which lies in *section*, private or shared.

    :raises OSError: Refused; part of it may be done.
    """
    memory = section.block.in_place
    if memory is None:
        vm.set_memory_attributes(section.gpa + offset - section.offset, size, private)
    else:
        set_attributes(memory, offset, size, private=private)


def establish(vm: Vm, section: RamSection, attributes: RamBlockAttributes) -> None:
    """
    Make the attributes of *section* what the page states say.

    The VM's may be anything before, and nobody sees them yet: all private, then what is shared. Those of a memory may
    be relied on already (another section, a listener), so only what differs changes.
    """
    shared = [
        (offset, offset + size) for offset, size in attributes.ranges(section.offset, section.size)
    ]
    private: Runs = iter(((section.offset, section.end),))
    if section.block.in_place is not None:
        private = complement(iter(shared), section.offset, section.end)
    for start, end in private:
        set_attribute(vm, section, start, end - start, private=MAKE_PRIVATE)
    for start, end in shared:
        set_attribute(vm, section, start, end - start, private=MAKE_SHARED)


def withdraw(vm: Vm, section: RamSection) -> None:
    """Leave the VM's attributes where *section* was as the kernel has them, shared; those of a memory go with it."""
    if section.block.in_place is None:
        set_attribute(vm, section, section.offset, section.size, private=MAKE_SHARED)
