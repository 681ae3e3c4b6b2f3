# SPDX-License-Identifier: Apache-2.0
"""A picture of guest memory: which parts of it the device reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ramblock.probe import Window

__all__ = ["STALE", "Area", "areas", "draw"]

#: The cell of a stale window.
STALE = "!"
# By how much of a cell is mapped.
_SHADES = " ░▒▓█"
# Windows that lie closer together than this are drawn in one line.
_GAP = 1 << 28
# Firmware ends here and memory goes on behind it, on a PC: two things, with nothing between them.
_BORDER = 1 << 32


@dataclass
class Area:
    """Windows that lie near each other."""

    address: int
    end: int
    windows: list[Window] = field(default_factory=list)

    @property
    def size(self) -> int:
        """From the first window to the last, in bytes."""
        return self.end - self.address

    @property
    def mapped(self) -> int:
        """Bytes of its windows."""
        return sum(window.size for window in self.windows)


def areas(windows: Sequence[Window]) -> list[Area]:
    """Divide windows, which ascend, into areas."""
    found: list[Area] = []
    for window in windows:
        if not found or window.address - found[-1].end >= _GAP or window.address == _BORDER:
            found.append(Area(window.address, window.end))
        found[-1].windows.append(window)
        found[-1].end = window.end
    return found


def draw(area: Area, cells: int) -> str:
    """Draw an area as a row of *cells* characters: the share that is mapped, or :data:`STALE`."""
    filled = [0.0] * cells
    stale = set()
    for window in area.windows:
        low = (window.address - area.address) * cells / area.size
        high = (window.end - area.address) * cells / area.size
        for cell in range(int(low), min(cells, int(high) + 1)):
            part = min(high, cell + 1) - max(low, cell)
            if part > 0:
                filled[cell] += part
                if window.stale:
                    stale.add(cell)
    return "".join(STALE if cell in stale else _shade(part) for cell, part in enumerate(filled))


def _shade(part: float) -> str:
    # Any mapping is seen; a cell is full only if all of it is mapped.
    last = len(_SHADES) - 1
    if not part:
        return _SHADES[0]
    return _SHADES[last] if part > 0.999 else _SHADES[min(last - 1, 1 + int(part * (last - 1)))]
