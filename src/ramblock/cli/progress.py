# SPDX-License-Identifier: Apache-2.0
"""How far a job is, on stderr: a line and a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Self

from ramblock.cli.terminal import err

__all__ = ["Progress", "counting"]

_EVERY_SECONDS = 0.5
_LINE_EVERY_SECONDS = 5.0


class Progress:
    """
    Shows a line now and then; a context manager, at whose end it goes from a terminal.

    :param quiet: Show nothing.
    :param lines: Also where there is no terminal.
    """

    def __init__(self, *, quiet: bool, lines: bool = True) -> None:
        self._terminal = err()
        #: Whether anything is shown at all.
        self.shows = not quiet and (lines or self._terminal.is_terminal)
        self._every = _EVERY_SECONDS if self._terminal.is_terminal else _LINE_EVERY_SECONDS
        self._began = self._shown = monotonic()

    def show(self, line: Callable[[float], str], done: int = 0, total: int | None = None) -> None:
        """
        Show a line, if it is time.

        :param line: Makes it, from the seconds since the begin.
        :param total: Draw a bar too, *done* of *total* long.
        """
        if not self.shows:
            return
        now = monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        text = line(now - self._began)
        if self._terminal.is_terminal:
            self._terminal.draw_progress(text, done, total)
        else:
            self._terminal.line(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.clear()


@contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show on a terminal how many there were, and how many a second; None: nowhere."""
    total = 0

    def update(more: int) -> None:
        nonlocal total
        total += more
        progress.show(lambda seconds: f"{total:,} {what}, {total / seconds:,.0f}/s")

    with Progress(quiet=quiet, lines=False) as progress:
        yield update if progress.shows else None
