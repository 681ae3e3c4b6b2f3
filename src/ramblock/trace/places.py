# SPDX-License-Identifier: Apache-2.0
"""Places of blocks and host addresses in the guest: for traces without guest addresses."""

from __future__ import annotations

from typing import NamedTuple

from ramblock.trace.events import Block, Layout, Source
from ramblock.trace.ranges import RangeMap

__all__ = ["Places"]

#: RAM blocks, and places of each, that are kept: KVM has fewer memory slots.
_MOST = 1024
_FEW = 8


class _HostPlace(NamedTuple):
    host: int
    guest: int


class _Place(NamedTuple):
    block: Block
    source: Source | None


class Places:
    """The places of RAM that the trace, or the user, has told."""

    def __init__(self) -> None:
        #: By name, or descriptor of the private side; then by first address.
        self._of_block: dict[str | int, dict[int, Block]] = {}
        self._guest: RangeMap[_Place] = RangeMap()
        self._hosts: RangeMap[_HostPlace] = RangeMap()

    def note(self, event: Layout) -> None:
        """Take new places, or take some away."""
        for block in event.blocks:
            if event.removed:
                self._remove(block)
            else:
                self.place(block, event.source)

    def place(self, block: Block, source: Source | None = None) -> None:
        """Take one place."""
        if block.end <= block.start:
            return
        places = self._of_block.get(_key(block))
        if places is None:
            if len(self._of_block) >= _MOST:
                return
            places = self._of_block[_key(block)] = {}
        elif len(places) >= _MOST and block.start not in places:
            return
        places[block.start] = block
        self._guest.set(block.start, block.end, _Place(block, source))
        if block.host is not None:
            self.note_host(block.start, block.end, block.host)

    def _remove(self, block: Block) -> None:
        places = self._of_block.get(_key(block), {})
        places.pop(block.start, None)
        if not places:
            self._of_block.pop(_key(block), None)
        if block.end <= block.start:
            return
        self._guest.set(block.start, block.end, None)
        if block.host is not None:
            self._hosts.set(block.host, block.host + block.end - block.start, None)

    def note_host(self, start: int, end: int, host: int) -> None:
        """Take the host address of a guest's range."""
        old = self._hosts.get(host)
        if old is None or old.guest - old.host != start - host:
            self._hosts.set(host, host + end - start, _HostPlace(host, start))

    def around(self, start: int, end: int) -> tuple[int, int]:
        """Return the whole place in which a range begins; the range itself, if none is known."""
        place = self._guest.get(start)
        if place is None:
            return start, end
        return place.block.start, max(place.block.end, end)

    def is_taken(self, block: Block, source: Source) -> bool:
        """Whether another source has told another block in this place."""
        return any(
            place.source is not None
            and place.source.name != source.name
            and place.block.host != block.host
            for _, _, place in self._guest.some(block.start, block.end, _FEW)
        )

    def is_told_by_another(self, source: Source) -> bool:
        """Whether places are known, and none of them from this source."""
        sources = {place.source for _, _, place in self._guest.some(0, 1 << 64, _FEW)}
        return bool(sources) and all(
            each is not None and each.name != source.name for each in sources
        )

    def of_block(
        self, name: str | None, start: int, end: int, within: tuple[int, int] | None = None
    ) -> list[list[tuple[int, int]]]:
        """
        Find where a range of a block may lie for the guest.

        :param name: None: the trace does not say; then each confidential block into which it fits
            is one possibility. Places with one private side are of one block.
        :param within: A range of the guest in which it has to begin, if that is known.
        :return: The possibilities, each a list of places.
        """
        if name is not None:
            blocks = self._of_block.get(name, {})
            found = [place for block in blocks.values() for place in _part_of(block, start, end)]
            return [found] if found else []
        fitting, partly = [], []
        for blocks in self._of_block.values():
            found = [
                place
                for block in blocks.values()
                if block.confidential
                for place in _part_of(block, start, end)
            ]
            if within is not None and not any(within[0] <= low < within[1] for low, _ in found):
                continue
            if sum(high - low for low, high in found) >= end - start:
                fitting.append(found)
            elif found:
                partly.append(found)
        return fitting or partly

    def of_host(self, start: int, end: int) -> list[tuple[int, int]]:
        """Find where a range of host addresses lies for the guest."""
        return [
            (low - place.host + place.guest, high - place.host + place.guest)
            for low, high, place in self._hosts.some(start, end, _MOST)
        ]


def _key(block: Block) -> str | int:
    return block.name if block.guest_memfd is None else block.guest_memfd


def _part_of(block: Block, start: int, end: int) -> list[tuple[int, int]]:
    low = max(start, block.offset)
    high = min(end, block.offset + block.end - block.start)
    if low >= high:
        return []
    return [(block.start + low - block.offset, block.start + high - block.offset)]
