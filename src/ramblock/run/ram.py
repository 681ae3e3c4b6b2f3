# SPDX-License-Identifier: Apache-2.0
"""The blocks of a run's guest, by guest address, as the host sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ramblock.guest.block import RamBlock
from ramblock.run.layout import BlockPlace

__all__ = ["GuestRam", "UsablePrivate"]


class UsablePrivate(Protocol):
    """A private backing that the run can use in the guest's name."""

    def use(self, offset: int) -> None:
        """Use the page at *offset*, so that there is something to free."""

    def allocated_bytes(self) -> int | None:
        """Bytes of memory in use; None where the kernel does not tell."""

    def close(self) -> None:
        """Give it back."""


class GuestRam:
    """All blocks: the run adds them while it builds the guest."""

    def __init__(self, places: Sequence[BlockPlace]) -> None:
        self.places = places
        self.blocks: dict[str, RamBlock] = {}
        self.private: dict[str, UsablePrivate] = {}

    def _place(self, gpa: int) -> BlockPlace:
        return next(place for place in self.places if place.gpa <= gpa < place.end)

    def read(self, gpa: int, size: int) -> bytes:
        """Read the shared side, inside one block, as the host does: in any state of the pages."""
        place = self._place(gpa)
        return self.blocks[place.name].read(gpa - place.gpa, size)

    def not_empty(self) -> Iterator[tuple[str, int]]:
        """Yield the confidential blocks that hold memory on either side, as (name, bytes)."""
        for name, private in self.private.items():
            size = (private.allocated_bytes() or 0) + (self.blocks[name].allocated_bytes() or 0)
            if size:
                yield name, size

    def use_privately(self, gpa: int) -> None:
        """Use a private page in the guest's name."""
        place = self._place(gpa)
        self.private[place.name].use(gpa - place.gpa)
