# SPDX-License-Identifier: Apache-2.0
"""The memory slots of a VM: the number of each section's."""

from __future__ import annotations

import errno

from ramblock.discard.section import RamSection
from ramblock.errors import UsageError, describe_range
from ramblock.kvm.descriptor import Descriptor
from ramblock.kvm.guest_memfd import GuestMemfd
from ramblock.uapi.kvm import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
    MemoryRegionFlags,
)
from ramblock.units import PAGE_SIZE

__all__ = ["SlotTable"]


# KVM_MEM_MAX_NR_PAGES (include/linux/kvm_host.h): the kernel says EINVAL to more, and not why.
_MAX_SLOT_BYTES = ((1 << 31) - 1) * PAGE_SIZE


class SlotTable:
    """
    Memory slots by section.

    Adding a present section and removing an absent one change nothing, so that either can be an
    undo.

    :param vm: The descriptor of the VM.
    :param limit: How many slots it has.
    """

    def __init__(self, vm: Descriptor, limit: int) -> None:
        self._vm = vm
        self._limit = limit
        self._slots: dict[RamSection, int] = {}

    def add(self, section: RamSection, private: GuestMemfd | None) -> None:
        """
        Let the guest see *section*.

        :param private: The backing of its private pages, if any.
        :raises OSError: Refused: the guest does not see it.
        """
        if section not in self._slots:
            number = self._free_number()
            self._set(number, section, private)
            self._slots[section] = number

    def remove(self, section: RamSection) -> None:
        """
        Take *section* away from the guest.

        On a closed VM it is enough to forget it: there is no vCPU left that could look.

        :raises OSError: Refused: the guest still sees it.
        """
        number = self._slots.get(section)
        if number is not None and not self._vm.closed:
            self._vm.call(
                KVM_SET_USER_MEMORY_REGION,
                f"removing slot {number} at {section.gpa:#x}",
                KvmUserspaceMemoryRegion(slot=number),
            )
        self._slots.pop(section, None)

    def _free_number(self) -> int:
        taken = set(self._slots.values())
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        if number >= self._limit:
            raise OSError(errno.ENOSPC, f"{self._vm.name}: all {self._limit} memory slots are used")
        return number

    def _set(self, number: int, section: RamSection, private: GuestMemfd | None) -> None:
        if section.size > _MAX_SLOT_BYTES:
            raise UsageError(
                f"{section!r}: a memory slot has at most {_MAX_SLOT_BYTES:#x} bytes,"
                f" not {section.size:#x}",
                value=section.size,
                expected="the block mapped in several sections",
            )
        flags = MemoryRegionFlags.KVM_MEM_READONLY if section.readonly else MemoryRegionFlags(0)
        address = section.block.address + section.offset
        what = f"slot {number} for {describe_range(section.gpa, section.size)}"
        if private is None:
            self._vm.call(
                KVM_SET_USER_MEMORY_REGION,
                what,
                KvmUserspaceMemoryRegion(number, flags, section.gpa, section.size, address),
            )
            return
        flags |= MemoryRegionFlags.KVM_MEM_GUEST_MEMFD
        self._vm.call(
            KVM_SET_USER_MEMORY_REGION2,
            f"{what} with guest_memfd",
            KvmUserspaceMemoryRegion2(
                number, flags, section.gpa, section.size, address, section.offset, private.fd
            ),
        )
