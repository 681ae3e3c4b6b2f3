# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from ramblock.run.tally import Outcome, Tally

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

__all__ = ["NoProgress", "PlainProgress", "RichProgress"]

_LINE_EVERY_SECONDS = 5.0


class NoProgress:
    """Shows nothing."""

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Show nothing."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class PlainProgress(NoProgress):
    """A line every few seconds."""

    def __init__(self) -> None:
        self._began = self._shown = monotonic()

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Print a line, if it is time."""
        now = monotonic()
        if now - self._shown < _LINE_EVERY_SECONDS:
            return
        self._shown = now
        of = "" if total is None else f" of {total:,}"
        rate = done / (now - self._began)
        print(f"{done:,}{of} requests, {rate:,.0f}/s, {violations} violations", file=sys.stderr)


class RichProgress(NoProgress):
    """A bar with rates."""

    def __init__(self) -> None:
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}/s"),
            TextColumn("{task.fields[violations]} violations"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            expand=True,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("converting", total=None, rate="-", violations="0")
        self._began = monotonic()
        return self

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Move the bar."""
        if self._bar is None or self._task is None:
            return
        rate = f"{done / max(monotonic() - self._began, 0.001):,.0f}"
        refused = tally.outcomes[Outcome.ROLLED_BACK] + tally.outcomes[Outcome.OVER_BUDGET]
        label = "converting" if not refused else f"converting ({refused:,} put back)"
        self._bar.update(
            self._task,
            completed=done,
            total=total,
            rate=rate,
            violations=f"{violations:,}",
            description=label,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
