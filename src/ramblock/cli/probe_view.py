# SPDX-License-Identifier: Apache-2.0
"""
The display of a running probe: a picture on a terminal, plain lines elsewhere.

Always on stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from time import monotonic

from ramblock.cli.probe_map import STALE, Area, areas, draw
from ramblock.cli.terminal import Line, Piece, Styled, err
from ramblock.errors import describe_range
from ramblock.probe import Probe
from ramblock.probe.expectation import VirtioMemExpectation
from ramblock.units import format_size

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
        self._terminal = err()
        self._terminal.line(f"listening at {probe.path}")

    def update(self) -> None:
        """Print the news."""
        record, client = self._probe.record, self._probe.client
        if client != self._client:
            text = f"{self._client} has left" if client is None else f"{client} is there"
            self._terminal.line(text)
            self._client = client
        for violation in record.violations[self._violations :]:
            self._terminal.line(str(violation))
            self._violations += 1
        if client is not None and monotonic() - self._shown > _LINE_EVERY_SECONDS:
            self._shown = monotonic()
            counts = record.counts
            self._terminal.line(
                f"{_windows(self._probe)}{_stale(self._probe)}; {counts['map']:,} maps,"
                f" {counts['unmap']:,} unmaps, {record.violation_count:,} violations"
            )


class LiveView(NoView):
    """Figures, rates, and a map of guest memory, redrawn in place."""

    def __init__(self, probe: Probe, expectation: VirtioMemExpectation | None) -> None:
        self._probe = probe
        self._expectation = expectation
        self._terminal = err()
        self._maps = _Rate()
        self._unmaps = _Rate()

    def __exit__(self, *_: object) -> None:
        self._terminal.clear()

    def update(self) -> None:
        """Draw it again."""
        # One line each at any width: lines that jump cannot be read.
        self._terminal.draw(self._lines(self._terminal.width))

    def _lines(self, width: int) -> list[Line]:
        latest = self._probe.record.violations[-_LATEST_VIOLATIONS:]
        return [
            *self._figures(),
            *self._areas(width),
            *self._plugged(),
            *(Styled(str(violation), "red") for violation in latest),
        ]

    def _figures(self) -> Iterator[Line]:
        record = self._probe.record
        client = self._probe.client or "nobody is there; Ctrl-C ends"
        yield Styled(str(self._probe.path), "bold"), f": {client}"
        yield _windows(self._probe), Styled(_stale(self._probe), "bold red reverse")
        maps, unmaps = record.counts["map"], record.counts["unmap"]
        count = record.violation_count
        yield (
            f"{maps:,} maps ({self._maps.of(maps):,.0f}/s), ",
            f"{unmaps:,} unmaps ({self._unmaps.of(unmaps):,.0f}/s), ",
            Styled(f"{count:,} violations", "bold red" if count else ""),
        )

    def _areas(self, width: int) -> Iterator[Line]:
        found = areas(self._probe.windows)
        labels = [_label(area) for area in found[:_MOST_AREAS]]
        longest = max(map(len, labels), default=0)
        cells = max(_FEWEST_CELLS, min(_MOST_CELLS, width - 3 - longest - 2))
        for area, label in zip(found, labels, strict=False):
            yield f"{label:>{longest}}  ", *_dressed(draw(area, cells))
        if len(found) > len(labels):
            yield f"and {len(found) - len(labels):,} more areas"

    def _plugged(self) -> Iterator[Line]:
        for device in dict(self._expectation.devices if self._expectation else {}).values():
            text = f"{device.name}: {format_size(device.plugged)} plugged"
            if device.agrees:
                yield f"{text}, and mapped"
            else:
                yield Styled(f"{text}, {format_size(device.mapped)} mapped", "bold red")


def _dressed(cells: str) -> Iterator[Piece]:
    """Make cells with a stale window stand out."""
    for stale, group in groupby(cells, STALE.__eq__):
        yield Styled("".join(group), "bold red reverse" if stale else "green")


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
    windows = probe.windows
    return f"{len(windows):,} windows, {format_size(sum(window.size for window in windows))}"


def _stale(probe: Probe) -> str:
    stale = probe.record.stale_count
    return f", {stale:,} STALE" if stale else ""


def _label(area: Area) -> str:
    return f"{describe_range(area.address, area.size)} {format_size(area.mapped):>9}"
