# SPDX-License-Identifier: Apache-2.0
"""
Who needs RAM to be discardable, and who forbids it.

A discard is *coordinated* if the listeners are told first; else memory just goes. The reason is
QEMU commit 852f0048f3 ("RAMBlock: make guest_memfd require uncoordinated discard"): conversions
discarded memory that VFIO had pinned, VFIO was not told, and its mappings went stale; so that
commit made the two exclude each other. A discard manager makes the conversion coordinated, and they
live together. QEMU keeps four counters for the whole process (system/physmem.c,
ram_block_discard_disable() and its kin); here they belong to one guest memory.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from enum import Enum

from ramblock.errors import BusyError


class HoldKind(Enum):
    """A demand on the memory."""

    #: Discards will happen, and listeners are told: page conversions, virtio-mem.
    REQUIRE_COORDINATED = "requires coordinated discards"
    #: Discards will happen, and nobody is told: a plain balloon.
    REQUIRE_UNCOORDINATED = "requires uncoordinated discards"
    FORBID_ALL = "forbids all discards"  #: The memory is pinned by somebody who hears nothing.
    #: It is pinned by somebody whom a listener drives: a mapper.
    FORBID_UNCOORDINATED = "forbids uncoordinated discards"


_CONFLICTS = {
    HoldKind.REQUIRE_COORDINATED: {HoldKind.FORBID_ALL},
    HoldKind.REQUIRE_UNCOORDINATED: {HoldKind.FORBID_ALL, HoldKind.FORBID_UNCOORDINATED},
    HoldKind.FORBID_ALL: {HoldKind.REQUIRE_COORDINATED, HoldKind.REQUIRE_UNCOORDINATED},
    HoldKind.FORBID_UNCOORDINATED: {HoldKind.REQUIRE_UNCOORDINATED},
}


class DiscardHold:
    """One user's claim; a context manager."""

    def __init__(self, coordinator: DiscardCoordinator, owner: str, kind: HoldKind) -> None:
        #: Where it is held; it moves with the block.
        self.coordinator = coordinator
        self.owner = owner
        self.kind = kind

    def release(self) -> None:
        """Give the claim back; twice is the same as once."""
        self.coordinator.drop(self)

    def __enter__(self) -> DiscardHold:
        return self

    def __exit__(self, *exception: object) -> None:
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

    def hold(self, owner: str, kind: HoldKind) -> DiscardHold:
        """Claim *kind* for *owner*; BusyError: somebody's claim contradicts it, nothing is held."""
        hold = DiscardHold(self, owner, kind)
        self._check(hold)
        self._holds.append(hold)
        return hold

    def drop(self, hold: DiscardHold) -> None:
        """Forget *hold*; nothing happens if it is not held here."""
        # In one step, since users release without the memory's lock.
        with suppress(ValueError):
            self._holds.remove(hold)

    def _check(self, hold: DiscardHold) -> None:
        for other in self._holds:
            if other.kind in _CONFLICTS[hold.kind]:
                raise BusyError(
                    f"{hold.owner} {hold.kind.value}, but {other.owner} {other.kind.value}"
                )

    def adopt(
        self, other: DiscardCoordinator, only: Collection[DiscardHold] | None = None
    ) -> list[DiscardHold]:
        """Take over claims, all or *only* some; BusyError: one contradicts ours, none has moved."""
        moving = [hold for hold in other.holds if only is None or hold in only]
        for hold in moving:
            self._check(hold)
        for hold in moving:
            other.drop(hold)
            hold.coordinator = self
            self._holds.append(hold)
        return moving
