# SPDX-License-Identifier: Apache-2.0
"""How far a plan is: on stderr, on a terminal, when it takes longer than a moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

__all__ = ["counting", "sweeping"]

_EVERY_SECONDS = 0.5
_LINE_EVERY_SECONDS = 5.0


@contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show a number that grows."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    began = shown = monotonic()
    total = 0

    def update(more: int) -> None:
        nonlocal shown, total
        total += more
        now = monotonic()
        if now - shown > _EVERY_SECONDS:
            shown = now
            sys.stderr.write(f"\r{total:,} {what} ")
            sys.stderr.flush()

    try:
        yield update
    finally:
        if shown != began:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextmanager
def sweeping(guests: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line every few seconds elsewhere."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        yield from _bar(guests)
    else:
        yield _lines(guests)


def _bar(guests: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("planning"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("guests"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True, transient=True) as bar:
        task = bar.add_task("", total=guests)
        yield lambda more: bar.advance(task, more)


def _lines(guests: int) -> Callable[[int], None]:
    shown = monotonic()
    total = 0

    def update(more: int) -> None:
        nonlocal shown, total
        total += more
        if monotonic() - shown > _LINE_EVERY_SECONDS:
            shown = monotonic()
            print(f"{total:,} of {guests:,} guests", file=sys.stderr)

    return update
