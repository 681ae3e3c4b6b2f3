# SPDX-License-Identifier: Apache-2.0
"""A section that enters or leaves a guest; the caller holds the memory's lock."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from ramblock.discard.guard import Guard
from ramblock.discard.notification import reserve
from ramblock.discard.undo import UndoLog
from ramblock.guest.devices import Attachment
from ramblock.guest.places import Place, PlaceMap
from ramblock.guest.vm import MAKE_SHARED, MemorySlots, Vm, establish, withdraw

__all__ = ["Placer"]

_log = logging.getLogger(__name__)


class Placer:
    """
    Brings sections into a guest and takes them out.

    :param guard: Of the memory.
    :param vm: What holds attributes and slots; None: nobody does.
    :param places: The sections that are there.
    :param attachments: Who maps them; the memory changes the list.
    """

    def __init__(
        self, guard: Guard, vm: Vm | None, places: PlaceMap, attachments: Sequence[Attachment]
    ) -> None:
        self._guard = guard
        self.vm = vm
        self._places = places
        self._attachments = attachments

    @property
    def slots(self) -> MemorySlots | None:
        """The VM, if it has memory slots."""
        vm: object = self.vm
        return vm if isinstance(vm, MemorySlots) else None

    def place(self, place: Place) -> None:
        """
        Bring *place* in: attributes, then the slot, then every target. All or nothing.

        :raises UsageError: A target cannot map it.
        :raises MappingLimitError: A mapper has no room for it.
        :raises BaseException: What the VM or a target raised; everything is as before.
        :raises PoisonedError: It could not be put back.
        """
        manager = place.block.discard_manager
        try:
            joining = [attachment.admit(place, self._guard) for attachment in self._attachments]
            replays = [manager.replay(registration) for registration in joining]
            reserve(replays)
            with UndoLog(self._guard, "map") as undo:
                # From the first moment: private before the slot lets the guest see the pages.
                undo.do(
                    "attribute", partial(self._set_attributes, place), partial(self._unset, place)
                )
                self._change_slot(undo, place, add=True)
                for registration, replay in zip(joining, replays, strict=True):
                    manager.join(undo, registration, replay)
        except BaseException:
            if not self._guard.poisoned:
                self._forget_listeners(place)
            raise
        self._places.add(place)

    def remove(self, place: Place, *, closing: bool = False) -> None:
        """
        Take *place* out: every target, then the slot, then the attributes. All or nothing.

        :param closing: Attributes that the VM does not reset are noted, and no failure.
        :raises BaseException: What the VM or a target raised; everything is as before.
        :raises PoisonedError: It could not be put back.
        """
        manager = place.block.discard_manager
        leaving = [
            registration
            for attachment in self._attachments
            if (registration := attachment.registration(place)) is not None
        ]

        def stay_unmapped() -> None:
            for registration in leaving:
                manager.stay_in_doubt(registration, "unmapped, and the VM does not take it back")

        with UndoLog(self._guard, "unmap") as undo:
            for registration in leaving:
                manager.leave(undo, registration)
            self._change_slot(undo, place, add=False, stuck=stay_unmapped)
            undo.do(
                "attribute",
                partial(self._unset if closing else self._reset, place),
                partial(self._set_attributes, place),
                stuck=stay_unmapped,
            )
        self._places.discard(place)
        self._forget_listeners(place)

    def force_out(self, place: Place) -> None:
        """Take *place* out whatever anybody says; what is not unmapped is noted as in doubt."""
        poisoned = self._guard.poisoned
        for attachment in self._attachments:
            attachment.force_out(place)
        self._places.discard(place)
        self._forget_listeners(place)
        try:
            if self.slots is not None:
                self.slots.remove_memory_slot(place.section)
        except BaseException as error:
            # The guest still sees the memory, as a device would: the block must keep it.
            self._guard.doubt(place.section, self.vm, f"the VM keeps its slot: {error!r}")
        else:
            if not poisoned:
                self._unset(place)

    def _forget_listeners(self, place: Place) -> None:
        for attachment in self._attachments:
            attachment.forget(place)

    def _change_slot(
        self,
        undo: UndoLog,
        place: Place,
        *,
        add: bool,
        stuck: Callable[[], None] | None = None,
    ) -> None:
        slots = self.slots
        if slots is None:
            return
        adding = partial(slots.add_memory_slot, place.section)
        removing = partial(slots.remove_memory_slot, place.section)
        do, put_back = (adding, removing) if add else (removing, adding)
        try:
            undo.do("slot", do, put_back, stuck=stuck)
        except Exception:
            # A refusal: the VM did nothing, and may refuse to undo what it never did.
            undo.drop_last()
            raise

    def _set_attributes(self, place: Place) -> None:
        """Private with private backing, but for what is shared already; ordinary RAM needs none."""
        if place.block.attributes is not None:
            establish(self.vm, place.block, place.section)
        elif self._places.may_be_private(place.section) and self.vm is not None:
            section = place.section
            self.vm.set_memory_attributes(section.gpa, section.size, MAKE_SHARED)

    def _reset(self, place: Place) -> None:
        """Back to the kernel's default, shared: the next block there may be ordinary RAM."""
        if place.block.attributes is not None:
            withdraw(self.vm, place.block, place.section)

    def _unset(self, place: Place) -> None:
        """
        :meth:`_reset` for a section that the guest does not see.

        Where the VM refuses, nobody is harmed: nothing is there. But the next section there has to
        set them.
        """
        try:
            self._reset(place)
        except OSError as error:
            self._places.note_private(place.section)
            _log.warning("%r: attributes are not reset: %s", place.section, error)
