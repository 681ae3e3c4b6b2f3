# SPDX-License-Identifier: Apache-2.0
"""
Who needs RAM to be discardable, and who forbids it.

Two kinds of discard. *Coordinated*: the listeners are told first (page conversions, virtio-mem). *Uncoordinated*: memory
just goes (a plain balloon). Two kinds of user stand against them. One that pins memory and hears nothing forbids both.
One that is driven by a listener forbids only the uncoordinated kind.

This is what QEMU commit 852f0048f3 ("RAMBlock: make guest_memfd require uncoordinated discard") is about: conversions
discarded memory that VFIO had pinned, VFIO was not told, and its mappings went stale; so that commit made the two exclude
each other. With a discard manager the conversion becomes coordinated, and they can live together. QEMU keeps four counters
for the whole process (system/physmem.c, ram_block_discard_disable() and its kin); here they belong to one guest memory.
"""

from __future__ import annotations

from enum import Enum
from types import TracebackType

from ramblock.errors import BusyError

__all__ = ["DiscardCoordinator", "DiscardHold", "HoldKind"]


class HoldKind(Enum):
    """What a user of memory asks for."""

    REQUIRE_COORDINATED = "requires coordinated discards"
    REQUIRE_UNCOORDINATED = "requires uncoordinated discards"
    FORBID_ALL = "forbids all discards"
    FORBID_UNCOORDINATED = "forbids uncoordinated discards"


_CONFLICTS = {
    HoldKind.REQUIRE_COORDINATED: {HoldKind.FORBID_ALL},
    HoldKind.REQUIRE_UNCOORDINATED: {HoldKind.FORBID_ALL, HoldKind.FORBID_UNCOORDINATED},
    HoldKind.FORBID_ALL: {HoldKind.REQUIRE_COORDINATED, HoldKind.REQUIRE_UNCOORDINATED},
    HoldKind.FORBID_UNCOORDINATED: {HoldKind.REQUIRE_UNCOORDINATED},
}


class DiscardHold:
    """One user's claim; a context manager. Giving it back twice is the same as once."""

    def __init__(self, coordinator: DiscardCoordinator, owner: str, kind: HoldKind) -> None:
        self.owner = owner
        self.kind = kind
        self._coordinator: DiscardCoordinator | None = coordinator

    def release(self) -> None:
        """Give the claim back."""
        if self._coordinator is not None:
            self._coordinator.drop(self)
            self._coordinator = None

    def move(self, coordinator: DiscardCoordinator) -> None:
        """Go over to another coordinator; the two of them keep the lists."""
        self._coordinator = coordinator

    def __enter__(self) -> DiscardHold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<DiscardHold: {self.owner} {self.kind.value}>"


class DiscardCoordinator:
    """The claims on one guest memory; the same user may hold several, and each counts."""

    def __init__(self) -> None:
        self._holds: list[DiscardHold] = []

    @property
    def holds(self) -> tuple[DiscardHold, ...]:
        """The claims that are held now, oldest first."""
        return tuple(self._holds)

    def require_coordinated(self, owner: str) -> DiscardHold:
        """Discards will happen, and listeners are told (conversions, virtio-mem). See :meth:`hold`."""
        return self.hold(owner, HoldKind.REQUIRE_COORDINATED)

    def require_uncoordinated(self, owner: str) -> DiscardHold:
        """Discards will happen and nobody is told (a plain balloon). See :meth:`hold`."""
        return self.hold(owner, HoldKind.REQUIRE_UNCOORDINATED)

    def forbid_all(self, owner: str) -> DiscardHold:
        """Memory is pinned by somebody who hears nothing. See :meth:`hold`."""
        return self.hold(owner, HoldKind.FORBID_ALL)

    def forbid_uncoordinated(self, owner: str) -> DiscardHold:
        """Memory is pinned by somebody who listens (a mapper). See :meth:`hold`."""
        return self.hold(owner, HoldKind.FORBID_UNCOORDINATED)

    def hold(self, owner: str, kind: HoldKind) -> DiscardHold:
        """
        Claim *kind* for *owner* until the result is released.

        :raises BusyError: Somebody holds what contradicts it; both are named. Nothing is held.
        """
        self._check(owner, kind)
        hold = DiscardHold(self, owner, kind)
        self._holds.append(hold)
        return hold

    def drop(self, hold: DiscardHold) -> None:
        """Forget *hold*; nothing happens if it is not held here."""
        self._holds = [other for other in self._holds if other is not hold]

    def _check(self, owner: str, kind: HoldKind) -> None:
        for other in self._holds:
            if other.kind in _CONFLICTS[kind]:
                raise BusyError(f"{owner} {kind.value}, but {other.owner} {other.kind.value}")

    def adopt(self, other: DiscardCoordinator) -> list[DiscardHold]:
        """
        Take over all claims of *other*, whose block is being placed here.

        :return: What was taken over.
        :raises BusyError: One of them contradicts one of ours. Nothing has moved.
        """
        for hold in other._holds:
            self._check(hold.owner, hold.kind)
        holds = list(other._holds)
        self._transfer(other, holds)
        return holds

    def give_back(self, other: DiscardCoordinator, holds: list[DiscardHold]) -> None:
        """Hand *holds* to *other*, whose block leaves."""
        other._transfer(self, [hold for hold in self._holds if hold in holds])

    def _transfer(self, giver: DiscardCoordinator, holds: list[DiscardHold]) -> None:
        moving = list(holds)
        for hold in moving:
            hold.move(self)
        self._holds = [*self._holds, *moving]
        giver._holds = [hold for hold in giver._holds if hold not in moving]
