# SPDX-License-Identifier: Apache-2.0
"""A section that enters or leaves a guest: the piece of those two transactions, and their steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from ramblock.guest.attachment import Attachment
from ramblock.guest.page_attributes import establish, withdraw
from ramblock.guest.sections import SectionMap
from ramblock.guest.vm import MAKE_SHARED, MemorySlots, Vm
from ramblock.memory.membership import MembershipGroup
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Step

__all__ = ["CLOSE", "PLACE", "REMOVE", "PlacedSection"]

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
        # What may have happened: an undo does only what it has to, and a VM may refuse to remove what it never had.
        self._attributes_touched = False
        self._slot_touched = False

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
        """Private for a block with private backing, but for what is shared already; ordinary RAM needs none."""
        section = self._section
        attributes = section.block.attributes
        if attributes is None:
            if self._sections.may_be_private(section):
                self._vm.set_memory_attributes(section.gpa, section.size, MAKE_SHARED)
            return
        self._attributes_touched = True
        establish(self._vm, section, attributes)

    def reset_attributes(self) -> None:
        """Back to the kernel's default, which is shared: the next block there may be ordinary RAM."""
        if self._section.block.attributes is not None:
            withdraw(self._vm, self._section)

    def unset_attributes(self) -> None:
        """
        Undo :meth:`set_attributes`, for a section that the guest does not see.

        Where the VM refuses, nobody is harmed: nothing is there. But the next section there has to set them.
        """
        if self._attributes_touched:
            try:
                self.reset_attributes()
            except OSError as error:
                self._sections.note_private(self._section)
                _log.warning("%r: attributes are not reset: %s", self._section, error)

    def drop_attributes(self) -> None:
        """:meth:`reset_attributes` for a section that goes whatever the VM says."""
        self._attributes_touched = True
        self.unset_attributes()

    def add_slot(self) -> None:
        """Let the guest see the section."""
        if self._slots is not None:
            self._touch_slot(self._slots.add_memory_slot)

    def remove_slot(self) -> None:
        """Hide the section from the guest."""
        if self._slots is not None:
            self._touch_slot(self._slots.remove_memory_slot)

    def unadd_slot(self) -> None:
        """Undo :meth:`add_slot`, if it may have happened."""
        if self._slot_touched:
            self.remove_slot()

    def unremove_slot(self) -> None:
        """Undo :meth:`remove_slot`, if it may have happened."""
        if self._slot_touched:
            self.add_slot()

    def _touch_slot(self, call: Callable[[RamSection], None]) -> None:
        self._slot_touched = True
        try:
            call(self._section)
        except Exception:
            self._slot_touched = False  # a refusal: the VM did nothing
            raise

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

    def stay_unmapped(self) -> None:
        """Where the VM does not take the section back, for any of the steps behind :meth:`leave`."""
        self._group.stay_in_doubt("unmapped, and the VM does not take it back")

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
        MembershipGroup(
            attachment.departure(self._section) for attachment in self._attachments
        ).leave_regardless()
        self.strike()
        self.abandon()
        try:
            self.remove_slot()
        except Exception as error:
            # The guest still sees the memory, as a device would: the block must keep it.
            self._section.block.guard.doubt(
                self._section, self._vm, f"the VM keeps its slot: {error!r}"
            )
        else:
            if not poisoned:
                self.drop_attributes()


#: "From the first moment": attributes are private before the slot lets the guest see the pages.
PLACE = (
    Step("attribute", PlacedSection.set_attributes, PlacedSection.unset_attributes),
    Step("slot", PlacedSection.add_slot, PlacedSection.unadd_slot),
    Step("map", PlacedSection.join, PlacedSection.unjoin),
    Step("list", PlacedSection.enlist, PlacedSection.strike),
)
REMOVE = (
    Step("unmap", PlacedSection.leave, PlacedSection.unleave),
    Step(
        "slot",
        PlacedSection.remove_slot,
        PlacedSection.unremove_slot,
        stuck=PlacedSection.stay_unmapped,
    ),
    Step(
        "attribute",
        PlacedSection.reset_attributes,
        PlacedSection.set_attributes,
        stuck=PlacedSection.stay_unmapped,
    ),
    Step("list", PlacedSection.strike, PlacedSection.enlist),
)
#: The same for a block that is closed, where attributes that cannot be reset are only noted.
CLOSE = (
    *REMOVE[:2],
    replace(REMOVE[2], do=PlacedSection.drop_attributes),
    *REMOVE[3:],
)
