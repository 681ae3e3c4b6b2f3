# SPDX-License-Identifier: Apache-2.0
"""The loop around ``GuestMemory.convert``: some places to shared, then the same to private."""

from __future__ import annotations

from collections.abc import Sequence

from harness.measure import timed_each
from harness.rows import Samples
from ramblock import GuestMemory, PageState
from ramblock.units import KIB

__all__ = ["DIRECTIONS", "PLACES", "ConvertLoop", "spread_places"]

#: The states, in the order in which the loop goes there.
DIRECTIONS = (PageState.SHARED, PageState.PRIVATE)

#: Conversions by one reading of the clock.
PLACES = 8


def spread_places(size: int, count: int = PLACES) -> list[int]:
    """Name guest addresses for ranges of *size* bytes, with as much between each two."""
    return [index * 2 * size for index in range(count)]


class ConvertLoop:
    """
    Convert places of one guest to and fro, each direction timed as a group.

    :param gpas: Where, ascending; private at the beginning and after each turn.
    :param size: How much at each, in bytes.
    """

    def __init__(self, memory: GuestMemory, gpas: Sequence[int], size: int = 4 * KIB) -> None:
        self._convert = memory.convert
        to_shared, to_private = ([(gpa, size, to) for gpa in gpas] for to in DIRECTIONS)
        # Backwards, so that each place meets its neighbours as it left them.
        self._groups = (to_shared, to_private[::-1])

    def turn(self, pairs: int) -> tuple[list[float], list[float]]:
        """Go there and back *pairs* times; nanoseconds per conversion, by direction and group."""
        times: tuple[list[float], list[float]] = [], []
        for _ in range(pairs):
            for group, samples in zip(self._groups, times, strict=True):
                samples.append(timed_each(self._convert, group))
        return times

    def turn_into(self, samples: Sequence[Samples], contender: str, pairs: int) -> None:
        """Make a turn and note it in *samples*, one for each direction."""
        for entry, times in zip(samples, self.turn(pairs), strict=True):
            entry.add(contender, times)
