# SPDX-License-Identifier: Apache-2.0
"""A listener that joins or leaves a discard manager: the piece of those two transactions, and their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ramblock.memory.notification import Change, Notification, Registration, reserve
from ramblock.memory.transaction import Step

if TYPE_CHECKING:
    from ramblock.memory.discard_manager import RamDiscardManager

__all__ = ["JOIN", "LEAVE", "Membership", "MembershipGroup"]


class Membership:
    """A listener joining or leaving a manager: the piece of those two transactions."""

    def __init__(self, manager: RamDiscardManager, registration: Registration) -> None:
        section = registration.section
        self._manager = manager
        self._registration = registration
        everything = Change(section.offset, section.end, None, hollow=True)
        #: What is populated, told to this listener alone.
        self.replay = Notification(
            manager, everything, manager.sources, populate=True, only=registration
        )
        self._farewell = Notification(
            manager, everything, manager.sources, populate=False, only=registration
        )

    def join(self) -> None:
        """Replay to the listener."""
        self.replay.tell()

    def unjoin(self) -> None:
        """Undo :meth:`join`."""
        self.replay.take_back()

    def leave(self) -> None:
        """Tell the listener the discard of all it holds."""
        self._farewell.tell()

    def unleave(self) -> None:
        """Undo :meth:`leave`."""
        self._farewell.take_back()

    def leave_regardless(self) -> None:
        """Tell the listener the discard of all it holds; what it refuses to let go is noted as in doubt."""
        self._farewell.tell_regardless()

    def enroll(self) -> None:
        """Put the listener on the list."""
        self._manager.registrations = (*self._manager.registrations, self._registration)

    def strike(self) -> None:
        """Take the listener off the list; nothing happens if it is not on it."""
        listener = self._registration.listener
        self._manager.registrations = tuple(
            entry for entry in self._manager.registrations if entry.listener is not listener
        )

    def reinstate(self) -> None:
        """Undo :meth:`strike`."""
        self.strike()
        self.enroll()

    def part(self) -> None:
        """Undo joining and enrolling; one that may still hold something stays on the list, for closing to tell it."""
        try:
            self.unjoin()
        except BaseException:
            self.reinstate()
            raise
        self.strike()

    def rejoin(self) -> None:
        """Undo leaving and striking."""
        self.reinstate()
        self.unleave()

    def stay_in_doubt(self, reason: str) -> None:
        """Put the listener back on the list without telling it what it left."""
        self.reinstate()
        self._farewell.doubt(reason)


class MembershipGroup:
    """Several listeners that join or leave together: all of them, or none."""

    def __init__(self, members: Iterable[Membership | None] = ()) -> None:
        self._members = [member for member in members if member is not None]

    def reserve(self) -> None:
        """Check the budgets for all of them joining; MappingLimitError if one is too small."""
        reserve(member.replay for member in self._members)

    def join(self) -> None:
        """Replay to each, and put it on its manager's list."""
        for member in self._members:
            member.join()
            member.enroll()

    def unjoin(self) -> None:
        """Undo :meth:`join`, however far it came."""
        self._all_of(Membership.part)

    def leave(self) -> None:
        """Tell each the discard of all it holds, and take it off the list."""
        for member in self._members:
            member.leave()
            member.strike()

    def unleave(self) -> None:
        """Undo :meth:`leave`, however far it came."""
        self._all_of(Membership.rejoin)

    def stay_in_doubt(self, reason: str) -> None:
        """Put each back on its manager's list without telling it what it left."""
        for member in self._members:
            member.stay_in_doubt(reason)

    def leave_regardless(self) -> None:
        """Make each leave whatever it says; what it refuses to let go is noted as in doubt."""
        for member in self._members:
            member.leave_regardless()
            member.strike()

    def _all_of(self, undo: Callable[[Membership], None]) -> None:
        """Undo each, latest first, and raise the last failure after all of them."""
        failure: BaseException | None = None
        for member in reversed(self._members):
            try:
                undo(member)
            except BaseException as error:  # the other members have to be put back too
                failure = error
        if failure is not None:
            raise failure


JOIN = (
    Step("map", Membership.join, Membership.unjoin),
    Step("list", Membership.enroll, Membership.strike),
)
LEAVE = (
    Step("unmap", Membership.leave, Membership.unleave),
    Step("list", Membership.strike, Membership.reinstate),
)
