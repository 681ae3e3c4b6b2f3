# SPDX-License-Identifier: Apache-2.0
"""
The shade of a guest page at one moment: its state, and who maps it.

The audit tells page states and mappings; a picture needs both at once, for each run of pages. This
joins them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from ramblock.trace.ranges import RangeMap

__all__ = ["Cell", "GuestPicture", "Shade"]


class Shade(IntEnum):
    """
    How a run of pages is drawn.

    Where several share a point of the picture, the highest is seen.
    """

    NOTHING = 0
    PRIVATE = 1
    #: Mapped, and the trace has not told whether private or shared.
    MAPPED = 2
    SHARED = 3
    SHARED_MAPPED = 4
    #: Private, and a device can reach it.
    STALE = 5


class Cell(NamedTuple):
    """A run of pages since its last change."""

    since: int
    private: bool | None
    """None: the trace has not told."""
    targets: frozenset[str]
    """Those that map it."""

    @property
    def shade(self) -> Shade:
        """How it is drawn."""
        if self.private is None:
            return Shade.MAPPED if self.targets else Shade.NOTHING
        if self.private:
            return Shade.STALE if self.targets else Shade.PRIVATE
        return Shade.SHARED_MAPPED if self.targets else Shade.SHARED


_NOTHING = Cell(0, None, frozenset())

#: Called with the range, its old shade, and its new one.
Changed = Callable[[int, int, Cell, Cell], None]


class GuestPicture:
    """
    The guest's memory as an audit shows it.

    One half of an :class:`~ramblock.trace.observer.AuditObserver`.

    :param changed: Called for each run whose state or targets change, before the change is kept.
    """

    def __init__(self, changed: Changed) -> None:
        self._changed = changed
        self._cells: RangeMap[Cell] = RangeMap()

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        """Note that pages are now private or shared."""
        for low, high, cell in self._cells_in(start, end):
            if cell.private is not private:
                self._set(low, high, cell, Cell(time, private, cell.targets))

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target mapped a range."""
        for low, high, cell in self._cells_in(start, end):
            if target not in cell.targets:
                self._set(low, high, cell, Cell(time, cell.private, cell.targets | {target}))

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target unmapped a range."""
        for low, high, cell in self._cells.pieces(start, end):
            if target in cell.targets:
                self._set(low, high, cell, Cell(time, cell.private, cell.targets - {target}))

    def cells(self) -> list[tuple[int, int, Cell]]:
        """Return the current ranges, ascending."""
        return list(self._cells.items())

    def _cells_in(self, start: int, end: int) -> list[tuple[int, int, Cell]]:
        gaps = [(low, high, _NOTHING) for low, high in self._cells.gaps(start, end)]
        return [*self._cells.pieces(start, end), *gaps]

    def _set(self, start: int, end: int, old: Cell, new: Cell) -> None:
        self._changed(start, end, old, new)
        self._cells.set(start, end, None if new.private is None and not new.targets else new)
