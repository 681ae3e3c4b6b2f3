# SPDX-License-Identifier: Apache-2.0
"""A mapper that is attached to a guest memory: its listeners, one per section, and the steps of attach and detach."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from ramblock.dma.mapper import Doubt, Mapper, SectionMapper
from ramblock.dma.target import DmaTarget
from ramblock.memory.backing import SharedBacking
from ramblock.memory.coordination import DiscardHold
from ramblock.memory.membership import Membership, MembershipGroup
from ramblock.memory.notification import Registration
from ramblock.memory.section import RamSection
from ramblock.memory.transaction import Step

__all__ = ["ATTACH", "DETACH", "Attachment"]


class Attachment:
    """
    A mapper and its listeners.

    :param attachments: The memory's list, which attach and detach change.
    :param mapper: Whose target is kept in step.
    :param hold: Its claim that nobody discards behind its back.
    :param doubt: Where pages in doubt are reported.
    """

    def __init__(
        self, attachments: list[Attachment], mapper: Mapper, hold: DiscardHold, doubt: Doubt
    ) -> None:
        self.mapper = mapper
        self.hold = hold
        self._attachments = attachments
        self._doubt = doubt
        self._listeners: dict[RamSection, SectionMapper] = {}
        # By listener. Nothing in here leads back to the target: else neither would ever go.
        self._reachable: dict[int, SharedBacking] = {}
        self._anchor: weakref.finalize[..., DmaTarget] | None = None
        self._group = MembershipGroup()

    def admit(self, section: RamSection) -> Membership:
        """
        Make a listener for *section*.

        :raises UsageError: The target cannot map it.
        """
        manager = section.block.discard_manager
        self.mapper.check_section(section, manager.min_granularity if manager.sources else None)
        listener = SectionMapper(self.mapper, section, self._doubt)
        self._listeners[section] = listener
        self._reachable[id(listener)] = section.block.shared
        return manager.check_in(listener, section)

    def membership(self, section: RamSection) -> Membership | None:
        """
        Look up the membership of the listener for *section*.

        None where there is none: an unmap that was interrupted at its very end leaves a listener that is in no list.
        """
        manager = section.block.discard_manager
        listener = self._listeners.get(section)
        if listener is None or not manager.has_listener(listener):
            return None
        return manager.membership(listener)

    def departure(self, section: RamSection) -> Membership:
        """
        Make the membership for leaving on a poisoned memory.

        Registered or not: after an undo that failed a listener may be in no list and still hold pages.
        """
        registration = Registration.of(self._listeners[section], section)
        return Membership(section.block.discard_manager, registration)

    def abandon(self, section: RamSection) -> None:
        """Forget the listener for *section*; nothing happens if there is none."""
        listener = self._listeners.pop(section, None)
        if listener is not None:
            self.mapper.remove(listener)
            if not listener.in_doubt:
                del self._reachable[id(listener)]

    def prepare(self, sections: Iterable[RamSection]) -> None:
        """Make listeners for all *sections*; raises UsageError or MappingLimitError, and nothing has changed."""
        self._group = MembershipGroup(self.admit(section) for section in sections)
        self._group.reserve()

    def hold_blocks(self) -> None:
        """Let the target keep alive what it reaches, also where nobody holds or closes the blocks any more."""
        try:
            self._anchor = weakref.finalize(self.mapper.target, self._reachable.clear)
        except TypeError:
            return  # it cannot be watched, for instance because it has __slots__
        self._anchor.atexit = False

    def let_blocks_go(self) -> None:
        """Undo :meth:`hold_blocks`, once nothing is mapped any more."""
        if self._anchor is not None:
            self._anchor.detach()

    def gather(self) -> None:
        """Find the listeners of all sections, to make them leave."""
        self._group = MembershipGroup(self.membership(section) for section in self._listeners)

    def join(self) -> None:
        """Map what is populated."""
        self._group.join()

    def unjoin(self) -> None:
        """Undo :meth:`join`."""
        self._group.unjoin()

    def leave(self) -> None:
        """Unmap everything."""
        self._group.leave()

    def unleave(self) -> None:
        """Undo :meth:`leave`."""
        self._group.unleave()

    def enlist(self) -> None:
        """Note the mapper as attached."""
        self.strike()
        self._attachments.append(self)

    def strike(self) -> None:
        """Undo :meth:`enlist`; nothing happens if it is not noted."""
        if self in self._attachments:
            self._attachments.remove(self)

    def force_out(self) -> None:
        """Unmap what the target lets go of, and stop watching; the rest is noted as in doubt."""
        self._group = MembershipGroup(self.departure(section) for section in self._listeners)
        self._group.leave_regardless()
        self.strike()


ATTACH = (
    Step("map", Attachment.join, Attachment.unjoin),
    Step("list", Attachment.enlist, Attachment.strike),
)
DETACH = (
    Step("unmap", Attachment.leave, Attachment.unleave),
    Step("list", Attachment.strike, Attachment.enlist),
)
