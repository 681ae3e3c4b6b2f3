# SPDX-License-Identifier: Apache-2.0
"""
A guest in 1 to 4,000 sections.

One block is cut in equal parts; as much address space is free behind each.

Does a conversion of 4 KiB depend on how many there are, and does placing one more? Memory that is
plugged by DIMMs, and the holes of a firmware's memory map, cut a guest so; one target with a
mapping per run is attached from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from harness.context import Context
from harness.loop import DIRECTIONS, PLACES, ConvertLoop
from harness.measure import timed
from harness.ours import IdleTarget, confidential_block
from harness.rows import Row, Samples
from ramblock import GuestMemory, MappingPolicy, RamBlock
from ramblock.units import PAGE_SIZE

__all__ = ["CASE", "COUNTS", "MAP_CASE", "contender", "run"]

CASE = "convert 4 KiB, by number of sections"
MAP_CASE = "GuestMemory.map, by number of sections that are there"

COUNTS = (1, 10, 100, 1_000, 4_000)

# Every count divides it, and a part of the smallest cut has more than one page.
_BLOCK_PAGES = 64_000

# Calls of map() whose times are reported for each count: the ones that lead up to it.
_MAPS = 8


def contender(count: int) -> str:
    """Name a guest of *count* sections in the table."""
    return f"{count:,} section{'s' if count > 1 else ''}"


def run(context: Context) -> Iterator[Row]:
    """Yield a row for each direction, and one for placing a section."""
    context.say(CASE)
    mapped = Samples()
    converted = [Samples() for _ in DIRECTIONS]
    with ExitStack() as stack:
        guests = {count: _Guest(stack, count) for count in COUNTS}
        biggest = guests[COUNTS[-1]]
        biggest.note_maps(mapped)
        for _ in range(context.choose(1, 3) - 1):
            with ExitStack() as other:
                _Guest(other, COUNTS[-1]).note_maps(mapped)
        for guest in guests.values():
            guest.loop.turn(1)
        for _ in range(context.choose(10, 50)):
            for count, guest in guests.items():
                guest.loop.turn_into(converted, contender(count), 2)
    for to, samples in zip(DIRECTIONS, converted, strict=True):
        yield samples.row(CASE, {"to": to.value})
    yield mapped.row(MAP_CASE, {"calls": f"{_MAPS} for each"})


class _Guest:
    """One block in *count* sections, and one target."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        size = _BLOCK_PAGES // count * PAGE_SIZE
        block = stack.enter_context(confidential_block(_BLOCK_PAGES * PAGE_SIZE))
        memory = GuestMemory()
        memory.attach(IdleTarget(), MappingPolicy.RUN)
        self._map_times = [timed(_place, memory, block, index, size) for index in range(count)]
        # Spread over the whole block, in as many sections as there are places or in all.
        step = _BLOCK_PAGES // PLACES
        pages = [index * step for index in range(PLACES)]
        part = size // PAGE_SIZE
        self.loop = ConvertLoop(
            memory, [(page + page // part * part) * PAGE_SIZE for page in pages]
        )

    def note_maps(self, samples: Samples) -> None:
        """Note the calls that led up to each count; without the first, which takes the block in."""
        for count in COUNTS[1:]:
            samples.add(f"up to {count:,}", self._map_times[max(count - _MAPS, 1) : count])


def _place(memory: GuestMemory, block: RamBlock, index: int, size: int) -> None:
    memory.map(block, index * 2 * size, offset=index * size, size=size)
