# SPDX-License-Identifier: Apache-2.0
"""What a probe shows while it runs: a picture on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from ramblock.errors import describe_range
from ramblock.probe import Probe, Window
from ramblock.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

__all__ = ["LiveView", "NoView", "PlainView", "areas", "draw_area"]

_LINE_EVERY_SECONDS = 5.0
# Windows that lie closer together than this are drawn in one line.
_GAP = 1 << 28
_CELLS = 64
_SHADES = " ░▒▓█"
_LINES = 12


class NoView:
    """Shows nothing."""

    def update(self) -> None:
        """Show nothing."""

    def __enter__(self) -> NoView:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class PlainView(NoView):
    """A line for each client and each finding, and one every few seconds while there is a client."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._client: str | None = None
        self._shown = monotonic()
        self._violations = 0
        print(f"listening at {probe.path}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """Print what is new."""
        record, client = self._probe.record, self._probe.client
        if client != self._client:
            print(
                f"{self._client} has left" if client is None else f"{client} is there",
                file=sys.stderr,
            )
            self._client = client
        for violation in record.violations[self._violations :]:
            print(violation, file=sys.stderr)
        self._violations = len(record.violations)
        if client is not None and monotonic() - self._shown > _LINE_EVERY_SECONDS:
            self._shown = monotonic()
            print(_figures(self._probe), file=sys.stderr)


class LiveView(NoView):
    """Figures, rates, and a map of guest memory, redrawn in place."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._live: Live | None = None
        self._before = (monotonic(), 0, 0)

    def __enter__(self) -> LiveView:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()
        self.update()
        return self

    def update(self) -> None:
        """Draw it again."""
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        probe = self._probe
        client = probe.client or "nobody is there yet; Ctrl-C ends"
        lines = [
            Text.assemble((str(probe.path), "bold"), f": {client}"),
            Text(_figures(probe) + self._rates()),
        ]
        windows = probe.windows
        found = areas(windows)
        for area in found[:_LINES]:
            lines.append(Text.assemble(f"{describe_range(*area):>34} ", _painted(area, windows)))
        if len(found) > _LINES:
            lines.append(Text(f"and {len(found) - _LINES} more areas"))
        for violation in probe.record.violations[-3:]:
            lines.append(Text(str(violation), style="red"))
        return Group(*lines)

    def _rates(self) -> str:
        counts = self._probe.record.counts
        before, maps, unmaps = self._before
        now = monotonic()
        if now - before > 1:
            self._before = (now, counts["map"], counts["unmap"])
            seconds = now - before
            self._text = (
                f"; {(counts['map'] - maps) / seconds:,.0f} maps/s,"
                f" {(counts['unmap'] - unmaps) / seconds:,.0f} unmaps/s"
            )
        return self._text

    _text = ""

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def _figures(probe: Probe) -> str:
    windows, record = probe.windows, probe.record
    text = (
        f"{len(windows):,} windows, {format_size(sum(window.size for window in windows))};"
        f" {record.counts['map']:,} maps, {record.counts['unmap']:,} unmaps,"
        f" {record.violation_count:,} violations"
    )
    return text + (f", {record.stale_count:,} STALE" if record.stale_count else "")


def areas(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """Put windows that are near each other together, as (address, size)."""
    found: list[tuple[int, int]] = []
    for window in windows:
        if found and window.address - sum(found[-1]) < _GAP:
            start = found[-1][0]
            found[-1] = start, window.end - start
        else:
            found.append((window.address, window.size))
    return found


def draw_area(area: tuple[int, int], windows: Sequence[Window]) -> tuple[str, list[int]]:
    """
    Draw an area in cells: how much of each is mapped, and which cells have a stale window.

    :return: The cells, and the positions of those with a stale window.
    """
    start, size = area
    filled = [0.0] * _CELLS
    stale = set()
    for window in windows:
        if not start <= window.address < start + size:
            continue
        low = (window.address - start) * _CELLS / size
        high = (window.end - start) * _CELLS / size
        for cell in range(int(low), min(_CELLS, int(high) + 1)):
            filled[cell] += max(0.0, min(high, cell + 1) - max(low, cell))
            if window.stale:
                stale.add(cell)
    last = len(_SHADES) - 1
    # What is mapped at all is seen, and only what is mapped as a whole is full.
    shades = [
        0 if not part else last if part > 0.999 else min(last - 1, 1 + int(part * (last - 1)))
        for part in filled
    ]
    return "".join(_SHADES[shade] for shade in shades), sorted(stale)


def _painted(area: tuple[int, int], windows: Sequence[Window]) -> Text:
    from rich.text import Text

    cells, stale = draw_area(area, windows)
    text = Text(cells, style="green")
    for position in stale:
        text.stylize("bold red reverse", position, position + 1)
    return text
