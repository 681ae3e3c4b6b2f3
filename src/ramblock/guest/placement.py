# SPDX-License-Identifier: Apache-2.0
"""A section that enters or leaves a guest: the piece of those two transactions, and their steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ramblock.guest.attachment import Attachment
from ramblock.guest.sections import SectionMap
from ramblock.guest.vm import MAKE_PRIVATE, MAKE_SHARED, MemorySlots, Vm
from ramblock.memory.membership import MembershipGroup
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Step

__all__ = ["PLACE", "REMOVE", "PlacedSection"]

_log = logging.getLogger(__name__)


class PlacedSection:
    """One section of one guest, and the listeners that the attached mappers have for it."""

    def __init__(
        self, vm: Vm, sections: SectionMap, section: RamSection, attachments: Sequence[Attachment]
    ) -> None:
        self._vm = vm
        self._slots = vm if isinstance(vm, MemorySlots) else None
        self._sections = sections
        self._attachments = attachments
        self._section = section
        self._group = MembershipGroup()

    def prepare(self) -> MembershipGroup:
        """Make a listener for each attached mapper; raises UsageError or MappingLimitError, and nothing has changed."""
        self._group = MembershipGroup(
            attachment.admit(self._section) for attachment in self._attachments
        )
        self._group.reserve()
        return self._group

    def gather(self) -> MembershipGroup:
        """Find the listeners that the attached mappers have."""
        self._group = MembershipGroup(
            attachment.membership(self._section) for attachment in self._attachments
        )
        return self._group

    def set_attributes(self) -> None:
        """Private for a block with private backing, but for what is shared already; ordinary RAM has none."""
        section = self._section
        attributes = section.block.attributes
        if attributes is None:
            return
        self._vm.set_memory_attributes(section.gpa, section.size, MAKE_PRIVATE)
        for offset, size in attributes.ranges(section.offset, section.size):
            self._vm.set_memory_attributes(section.gpa + offset - section.offset, size, MAKE_SHARED)

    def reset_attributes(self) -> None:
        """Back to the kernel's default, which is shared: the next block there may be ordinary RAM."""
        if self._section.block.attributes is not None:
            self._vm.set_memory_attributes(self._section.gpa, self._section.size, MAKE_SHARED)

    def add_slot(self) -> None:
        """Let the guest see the section."""
        if self._slots is not None:
            self._slots.add_memory_slot(self._section)

    def remove_slot(self) -> None:
        """Hide the section from the guest."""
        if self._slots is not None:
            self._slots.remove_memory_slot(self._section)

    def join(self) -> None:
        """Map what is populated, in every target."""
        self._group.join()

    def unjoin(self) -> None:
        """Undo :meth:`join`."""
        self._group.unjoin()

    def leave(self) -> None:
        """Unmap it, in every target."""
        self._group.leave()

    def unleave(self) -> None:
        """Undo :meth:`leave`."""
        self._group.unleave()

    def enlist(self) -> None:
        """Note the section as the guest's."""
        self.strike()
        self._sections.add(self._section)

    def strike(self) -> None:
        """Undo :meth:`enlist`; nothing happens if it is not noted."""
        self._sections.discard(self._section)

    def abandon(self) -> None:
        """Forget the listeners of a section that is not there (any more)."""
        for attachment in self._attachments:
            attachment.abandon(self._section)

    def force_out(self, *, poisoned: bool) -> None:
        """Take the section out whatever anybody says; what could not be unmapped is noted as in doubt."""
        self.gather().leave_regardless()
        self.strike()
        self.abandon()
        try:
            self.remove_slot()
            if not poisoned:
                self.reset_attributes()
        except OSError as error:
            _log.error("%r: the VM keeps it: %s", self._section, error)


#: "From the first moment": attributes are private before the slot lets the guest see the pages.
PLACE = (
    Step("attribute", PlacedSection.set_attributes, PlacedSection.reset_attributes),
    Step("slot", PlacedSection.add_slot, PlacedSection.remove_slot),
    Step("map", PlacedSection.join, PlacedSection.unjoin),
    Step("list", PlacedSection.enlist, PlacedSection.strike),
)
REMOVE = (
    Step("unmap", PlacedSection.leave, PlacedSection.unleave),
    Step("slot", PlacedSection.remove_slot, PlacedSection.add_slot),
    Step("attribute", PlacedSection.reset_attributes, PlacedSection.set_attributes),
    Step("list", PlacedSection.strike, PlacedSection.enlist),
)
