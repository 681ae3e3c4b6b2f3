# SPDX-License-Identifier: Apache-2.0
"""A section that enters or leaves a guest; the caller holds the memory's lock."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from ramblock.discard.guard import Guard
from ramblock.discard.notification import reserve
from ramblock.discard.section import RamSection
from ramblock.discard.undo import UndoLog
from ramblock.guest.devices import Attachment
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.vm import MAKE_SHARED, MemorySlots, Vm, change_slot, establish, withdraw

__all__ = ["Placer"]

_log = logging.getLogger(__name__)


class Placer:
    """
    Brings sections into a guest and takes them out.

    :param guard: Of the memory.
    :param vm: Holds attributes and slots; None: nobody does.
    :param places: The sections that are there.
    :param attachments: Who maps them; the memory changes the list.
    """

    def __init__(
        self, guard: Guard, vm: Vm | None, places: PlaceMap, attachments: Sequence[Attachment]
    ) -> None:
        self.guard = guard
        self.vm = vm
        self.places = places
        self._attachments = attachments
        # Sections that have gone, and whose attributes the VM did not reset.
        self._not_reset: list[RamSection] = []

    def place(self, place: Place) -> None:
        """
        Bring *place* in: attributes, then the slot, then every target. All or nothing.

        :raises UsageError: A target cannot map it.
        :raises MappingLimitError: A mapper has no room for it.
        :raises BaseException: From the VM or a target; everything is as before.
        :raises PoisonedError: It could not be put back.
        """
        manager = place.block.discard_manager
        try:
            joining = [attachment.admit(place) for attachment in self._attachments]
            replays = [manager.replay(registration) for registration in joining]
            reserve(replays)
            with UndoLog(self.guard, "map") as undo:
                # From the first moment: private before the slot lets the guest see the pages.
                undo.do("attribute", self._set_attributes, self._try_to_withdraw, place)
                change_slot(undo, self.vm, place, add=True)
                for registration, replay in zip(joining, replays, strict=True):
                    manager.join(undo, registration, replay)
        except BaseException:
            if not self.guard.poisoned:
                self._forget_listeners(place)
            raise
        self.places.add(place)

    def remove(self, place: Place, *, closing: bool = False) -> None:
        """
        Take *place* out: every target, then the slot, then the attributes. All or nothing.

        :param closing: Attributes that the VM does not reset are noted, and no failure.
        :raises BaseException: From the VM or a target; everything is as before.
        :raises PoisonedError: It could not be put back.
        """
        manager = place.block.discard_manager
        found = [attachment.registration(place) for attachment in self._attachments]
        leaving = [registration for registration in found if registration is not None]

        def stay_unmapped(*_: object) -> None:
            for registration in leaving:
                manager.stay_in_doubt(registration, "unmapped, and the VM does not take it back")

        unset = self._try_to_withdraw if closing else partial(withdraw, self.vm)
        with UndoLog(self.guard, "unmap") as undo:
            for registration in leaving:
                manager.leave(undo, registration)
            change_slot(undo, self.vm, place, add=False, stuck=stay_unmapped)
            undo.do("attribute", unset, self._set_attributes, place, stuck=stay_unmapped)
        self.places.discard(place)
        self._forget_listeners(place)

    def force_out(self, place: Place) -> None:
        """Take *place* out whatever anybody says; the rest of its mappings is noted as in doubt."""
        poisoned = self.guard.poisoned
        for attachment in self._attachments:
            attachment.force_out(place)
        self.places.discard(place)
        self._forget_listeners(place)
        vm: object = self.vm
        try:
            if isinstance(vm, MemorySlots):
                vm.remove_memory_slot(place.section)
        except BaseException as error:
            # The guest still sees the memory, as a device would: the block must keep it.
            self.guard.doubt(place.section, vm, f"the VM keeps its slot: {error!r}")
        else:
            if not poisoned:
                self._try_to_withdraw(place)

    def _forget_listeners(self, place: Place) -> None:
        for attachment in self._attachments:
            attachment.forget(place)

    def _set_attributes(self, place: Place) -> None:
        section = place.section
        if place.block.attributes is not None:
            establish(self.vm, place)
        elif self.vm is not None and any(
            old.gpa < section.gpa_end and section.gpa < old.gpa_end for old in self._not_reset
        ):
            # Ordinary RAM has the kernel's default, which an earlier section may have left changed.
            self.vm.set_memory_attributes(section.gpa, section.size, MAKE_SHARED)

    def _try_to_withdraw(self, place: Place) -> None:
        # For a section that the guest does not see. Where the VM refuses, nobody is harmed: nothing
        # is there. But the next section there has to set the attributes.
        try:
            withdraw(self.vm, place)
        except OSError as error:
            self._not_reset.append(place.section)
            _log.warning("%r: attributes are not reset: %s", place.section, error)
