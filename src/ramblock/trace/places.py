# SPDX-License-Identifier: Apache-2.0
"""Places of blocks and host addresses in the guest: for traces without guest addresses."""

from __future__ import annotations

from typing import NamedTuple

from ramblock.trace.events import Block, Layout
from ramblock.trace.ranges import RangeMap

__all__ = ["Places"]


class _HostPlace(NamedTuple):
    host: int
    guest: int


class Places:
    """The places of RAM that the trace, or the user, has told."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._hosts: RangeMap[_HostPlace] = RangeMap()

    def note(self, event: Layout) -> None:
        """Take new places, or take some away."""
        for block in event.blocks:
            if event.removed:
                self._blocks.pop(block.start, None)
                if block.host is not None:
                    self._hosts.set(block.host, block.host + block.end - block.start, None)
            else:
                self.place(block)

    def place(self, block: Block) -> None:
        """Take one place."""
        self._blocks[block.start] = block
        if block.host is not None:
            self.note_host(block.start, block.end, block.host)

    def note_host(self, start: int, end: int, host: int) -> None:
        """Take the host address of a guest's range."""
        old = self._hosts.get(host)
        if old is None or old.guest - old.host != start - host:
            self._hosts.set(host, host + end - start, _HostPlace(host, start))

    def of_block(self, name: str | None, start: int, end: int) -> list[tuple[int, int]]:
        """
        Find where a range of a block lies for the guest.

        :param name: None: the trace does not say; then there must be one confidential block only.
        :return: Nothing, where that is not known.
        """
        if name is None:
            blocks = [block for block in self._blocks.values() if block.confidential]
            if len({block.name for block in blocks}) != 1:
                return []
        else:
            blocks = [block for block in self._blocks.values() if block.name == name]
        found = []
        for block in blocks:
            low = max(start, block.offset)
            high = min(end, block.offset + block.end - block.start)
            if low < high:
                found.append((block.start + low - block.offset, block.start + high - block.offset))
        return found

    def of_host(self, start: int, end: int) -> list[tuple[int, int]]:
        """Find where a range of host addresses lies for the guest."""
        return [
            (low - place.host + place.guest, high - place.host + place.guest)
            for low, high, place in self._hosts.pieces(start, end)
        ]
