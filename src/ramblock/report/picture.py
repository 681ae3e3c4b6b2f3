# SPDX-License-Identifier: Apache-2.0
"""
The guest's memory as a picture: its state, and whether a device maps it, over time.

The audit tells page states and mappings; a picture needs both at once, for each run of pages. This
joins them, at the cost of a look-up for an event that changes exactly one run, as nearly all do:
drawing must not cost more than the audit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from enum import IntEnum
from typing import NamedTuple

__all__ = ["Picture", "Rectangle", "Shade"]


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


class Rectangle(NamedTuple):
    """
    A run of pages that looked the same for a while.

    Nanoseconds of the trace's clock, guest addresses in bytes; ends exclusive.
    """

    since: int
    until: int
    start: int
    end: int
    shade: int
    """A :class:`Shade`."""

    @property
    def lasted(self) -> int:
        """Nanoseconds."""
        return self.until - self.since


_UNTOLD, _PRIVATE, _SHARED = 0, 1, 2
# By state, and by whether anybody maps it. Plain numbers: an enum's member is slower to use.
_SHADES = (
    (int(Shade.NOTHING), int(Shade.MAPPED)),
    (int(Shade.PRIVATE), int(Shade.STALE)),
    (int(Shade.SHARED), int(Shade.SHARED_MAPPED)),
)
_STALE = int(Shade.STALE)

# A run: its end, since when it looks so, its state, and a bit for each target that maps it.
_Run = list[int]


class _Bits(dict[str, int]):
    """A bit for each target."""

    def __missing__(self, target: str) -> int:
        bit = self[target] = 1 << len(self)
        return bit


class Picture:
    """Draws rectangles while the audit goes by. Times never fall."""

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._starts: list[int] = []
        self._bits = _Bits()
        self.now = 0
        #: Bytes by shade.
        self.bytes = [0] * len(Shade)
        #: The fields of rectangles, one after the other: as objects of their own, hundreds of
        #: thousands would keep the garbage collector busy.
        self.drawn: list[int] = []

    def page_state(self, start: int, end: int, *, private: bool) -> None:
        """Make pages private or shared."""
        self._change(start, end, _PRIVATE if private else _SHARED, 0, -1)

    def mapped(self, target: str, start: int, end: int) -> None:
        """Map a range for a target."""
        self._change(start, end, _UNTOLD, self._bits[target], -1)

    def unmapped(self, target: str, start: int, end: int) -> None:
        """Unmap a range; parts of it may not be mapped."""
        self._change(start, end, _UNTOLD, 0, ~self._bits[target])

    def columns(self) -> list[list[int]]:
        """Return the fields of all rectangles, each as a list; the runs of now end now."""
        drawn = self.drawn.copy()
        for start, run in sorted(self._runs.items()):
            shade = _SHADES[run[2]][run[3] != 0]
            if shade:
                drawn += (run[1], self.now, start, run[0], shade)
        return [drawn[field :: len(Rectangle._fields)] for field in range(len(Rectangle._fields))]

    def _change(self, start: int, end: int, state: int, more: int, mask: int) -> None:
        run = self._runs.get(start)
        if run is None or run[0] != end:
            self._change_some(start, end, state, more, mask)
            return
        _, since, old_state, old_targets = run
        targets = old_targets & mask | more
        state = state or old_state
        if state == old_state and targets == old_targets:
            return
        # As in _draw(), without a call: this is every event of an ordinary trace.
        before = _SHADES[old_state][old_targets != 0]
        now = self.now
        self.bytes[before] -= end - start
        self.bytes[_SHADES[state][targets != 0]] += end - start
        if before and (since != now or before == _STALE):
            self.drawn += (since, now, start, end, before)
        # A run that nothing is known of any more stays: the same is likely to come again.
        run[1] = now
        run[2] = state
        run[3] = targets

    def _draw(self, start: int, run: _Run, state: int, targets: int) -> None:
        end, since, old_state, old_targets = run
        before = _SHADES[old_state][old_targets != 0]
        after = _SHADES[state][targets != 0]
        held = self.bytes
        held[before] -= end - start
        held[after] += end - start
        if before and (since != self.now or before == _STALE):
            self.drawn += (since, self.now, start, end, before)

    def _change_some(self, start: int, end: int, state: int, more: int, mask: int) -> None:
        """Change whatever lies in the range, cut at its ends; join runs that look the same."""
        starts, runs = self._starts, self._runs
        low = bisect_right(starts, start)
        if low and runs[starts[low - 1]][0] > start:
            low -= 1
        high = bisect_left(starts, end, low)
        old = [(each, runs.pop(each)) for each in starts[low:high]]
        new: list[tuple[int, _Run]] = []
        known = bool(state or more)
        at = start
        for first, run in old:
            last = run[0]
            if first < start:
                _join(new, first, [start, *run[1:]])
                first = start
            if known and at < first:
                self._add(new, at, [first, 0, _UNTOLD, 0], state, more, mask)
            at = min(last, end)
            self._add(new, first, [at, *run[1:]], state, more, mask)
            if last > end:
                _join(new, end, run)
        if known and at < end:
            self._add(new, at, [end, 0, _UNTOLD, 0], state, more, mask)
        starts[low:high] = [first for first, _ in new]
        runs.update(new)

    def _add(
        self, runs: list[tuple[int, _Run]], start: int, run: _Run, state: int, more: int, mask: int
    ) -> None:
        new_state, targets = state or run[2], run[3] & mask | more
        if new_state != run[2] or targets != run[3]:
            self._draw(start, run, new_state, targets)
            run = [run[0], self.now, new_state, targets]
        if new_state or targets:
            _join(runs, start, run)


def _join(runs: list[tuple[int, _Run]], start: int, run: _Run) -> None:
    if runs:
        before = runs[-1][1]
        if before[0] == start and before[1:] == run[1:]:
            before[0] = run[0]
            return
    runs.append((start, run))
