# SPDX-License-Identifier: Apache-2.0
"""
The display of a running probe: a picture on a terminal, plain lines elsewhere.

Always on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING

from ramblock.cli.probe_map import STALE, Area, areas, draw
from ramblock.errors import describe_range
from ramblock.probe import Probe
from ramblock.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from ramblock.probe.expectation import VirtioMemExpectation

__all__ = ["LiveView", "NoView", "PlainView"]

_LINE_EVERY_SECONDS = 5.0
_FEWEST_CELLS, _MOST_CELLS = 16, 96
_MOST_AREAS = 12
_LATEST_VIOLATIONS = 4


class NoView:
    """Shows nothing."""

    def update(self) -> None:
        """Show nothing."""

    def __enter__(self) -> NoView:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class PlainView(NoView):
    """A line for each client and each finding, and every few seconds while there is a client."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._client: str | None = None
        self._shown = monotonic()
        self._violations = 0
        print(f"listening at {probe.path}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """Print the news."""
        record, client = self._probe.record, self._probe.client
        if client != self._client:
            text = f"{self._client} has left" if client is None else f"{client} is there"
            print(text, file=sys.stderr)
            self._client = client
        for violation in record.violations[self._violations :]:
            print(violation, file=sys.stderr)
            self._violations += 1
        if client is not None and monotonic() - self._shown > _LINE_EVERY_SECONDS:
            self._shown = monotonic()
            counts = record.counts
            print(
                f"{_windows(self._probe)}; {counts['map']:,} maps, {counts['unmap']:,} unmaps,"
                f" {record.violation_count:,} violations",
                file=sys.stderr,
            )


class LiveView(NoView):
    """Figures, rates, and a map of guest memory, redrawn in place."""

    def __init__(self, probe: Probe, expectation: VirtioMemExpectation | None) -> None:
        self._probe = probe
        self._expectation = expectation
        self._live: Live | None = None
        self._maps = _Rate()
        self._unmaps = _Rate()

    def __enter__(self) -> LiveView:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()
        self.update()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Draw it again."""
        if self._live is not None:
            # Room for the terminal's own ^C: if that began a line, one line of the picture would
            # stay for good.
            width = self._live.console.width - 3
            self._live.update(self._draw(width), refresh=True)

    def _draw(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        lines = [*self._figures(), *self._areas(width), *self._plugged()]
        latest = self._probe.record.violations[-_LATEST_VIOLATIONS:]
        lines += [Text(str(violation), style="red") for violation in latest]
        for line in lines:
            # One line each at any width: lines that jump cannot be read.
            line.truncate(width, overflow="ellipsis")
        return Group(*lines)

    def _figures(self) -> Iterator[Text]:
        from rich.text import Text

        record = self._probe.record
        client = self._probe.client or "nobody is there; Ctrl-C ends"
        yield Text.assemble((str(self._probe.path), "bold"), f": {client}")
        figures = Text(_windows(self._probe))
        figures.highlight_regex(r"[\d,]+ STALE", "bold red reverse")
        yield figures
        maps, unmaps = record.counts["map"], record.counts["unmap"]
        count = record.violation_count
        yield Text.assemble(
            f"{maps:,} maps ({self._maps.of(maps):,.0f}/s),"
            f" {unmaps:,} unmaps ({self._unmaps.of(unmaps):,.0f}/s), ",
            (f"{count:,} violations", "bold red" if count else ""),
        )

    def _areas(self, width: int) -> Iterator[Text]:
        from rich.text import Text

        found = areas(self._probe.windows)
        labels = [_label(area) for area in found[:_MOST_AREAS]]
        longest = max(map(len, labels), default=0)
        cells = max(_FEWEST_CELLS, min(_MOST_CELLS, width - longest - 2))
        for area, label in zip(found, labels, strict=False):
            text = Text(draw(area, cells), style="green")
            text.highlight_regex(f"[{STALE}]+", "bold red reverse")
            yield Text.assemble(f"{label:>{longest}}  ", text)
        if len(found) > len(labels):
            yield Text(f"and {len(found) - len(labels):,} more areas")

    def _plugged(self) -> Iterator[Text]:
        from rich.text import Text

        for device in dict(self._expectation.devices if self._expectation else {}).values():
            text = f"{device.name}: {format_size(device.plugged)} plugged"
            if device.agrees:
                yield Text(f"{text}, and mapped")
            else:
                yield Text(f"{text}, {format_size(device.mapped)} mapped", style="bold red")


class _Rate:
    """How fast a number grows, looked at once a second."""

    def __init__(self) -> None:
        self._since = monotonic()
        self._before = 0
        self._rate = 0.0

    def of(self, number: int) -> float:
        """Return the latest rate, per second; *number* has been reached."""
        seconds = monotonic() - self._since
        if seconds >= 1:
            self._rate = (number - self._before) / seconds
            self._since, self._before = monotonic(), number
        return self._rate


def _windows(probe: Probe) -> str:
    windows, stale = probe.windows, probe.record.stale_count
    text = f"{len(windows):,} windows, {format_size(sum(window.size for window in windows))}"
    return text + (f", {stale:,} STALE" if stale else "")


def _label(area: Area) -> str:
    return f"{describe_range(area.address, area.size)} {format_size(area.mapped):>9}"
