# SPDX-License-Identifier: Apache-2.0
"""The findings of a probe, at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ramblock.cli.terminal import Styled, Terminal, out
from ramblock.errors import describe_range
from ramblock.probe import Record, StaleWindow
from ramblock.units import format_size

__all__ = ["print_summary", "summary_fields"]

_SHOWN = 8


def summary_fields(record: Record) -> dict[str, Any]:
    """Fields of the ``summary`` event."""
    return {
        "clients": record.clients,
        "counts": dict(record.counts),
        "peak_windows": record.peak_windows,
        "peak_bytes": record.peak_bytes,
        "violations": {rule.name.lower(): count for rule, count in record.broken.items()},
        "stale_windows": record.stale_count,
        "noted": {kind.name.lower(): count for kind, count in record.noted.items()},
    }


def print_summary(record: Record) -> None:
    """Print it on stdout."""
    terminal = out()
    counts = record.counts
    terminal.line(
        Styled(f"{record.clients} client{'' if record.clients == 1 else 's'}", "bold"),
        f", {counts['map']:,} maps, {counts['unmap']:,} unmaps;"
        f" at most {record.peak_windows:,} windows with {format_size(record.peak_bytes)}",
    )
    if counts["dma"]:
        terminal.line(
            f"{counts['dma']:,} accesses of the device ({counts['touch']:,} touches,"
            f" {counts['scribble']:,} scribbles), {counts['fault']:,} faulted"
        )
    _print_stale(terminal, record)
    _print_violations(terminal, record)
    _print_notes(terminal, record)


def _print_stale(terminal: Terminal, record: Record) -> None:
    if not record.stale_count:
        return
    terminal.line(
        Styled(f"{record.stale_count:,} stale windows", "bold red"),
        ": the client wanted them gone, and the device reached them",
    )
    # One refused unmap leaves many of them.
    by_unmap: dict[tuple[str, tuple[int, int]], list[StaleWindow]] = {}
    for stale in record.stale:
        by_unmap.setdefault((stale.client, stale.unmap), []).append(stale)
    for (client, unmap), some in list(by_unmap.items())[:_SHOWN]:
        start, end = some[0].address, some[-1].address + some[-1].size
        windows = "1 window" if len(some) == 1 else f"{len(some):,} windows"
        terminal.line(
            f"  {client}: {describe_range(start, end - start)}, {windows} with"
            f" {format_size(sum(stale.size for stale in some))}, {_how_long(some)};"
            f" the unmap of {describe_range(*unmap)} was refused"
        )
    if len(by_unmap) > _SHOWN:
        terminal.line(f"  and after {len(by_unmap) - _SHOWN:,} more unmaps")


def _how_long(some: list[StaleWindow]) -> str:
    times = [s.until_ns - s.since_ns for s in some if s.until_ns is not None]
    if not times:
        return "to the end"
    if len(times) < len(some):
        return f"{len(some) - len(times):,} of them to the end"
    return f"for up to {max(times) / 1e9:.3f} s"


def _print_violations(terminal: Terminal, record: Record) -> None:
    for rule, count in record.broken.most_common():
        terminal.line(Styled(f"{count:,} x {rule.value}", "bold red"))
        # A client that tries again breaks the same rule at the same place.
        some = Counter(str(violation) for violation in record.violations if violation.rule is rule)
        shown = list(some.items())[:_SHOWN]
        for text, times in shown:
            terminal.line(f"  {text}" + (f" ({times:,} times)" if times > 1 else ""), hang=4)
        if more := count - sum(times for _, times in shown):
            terminal.line(f"  and {more:,} more")


def _print_notes(terminal: Terminal, record: Record) -> None:
    """Print the things that were let pass. They are no findings."""
    for kind, count in record.noted.most_common():
        terminal.line(f"let pass {count:,} x {kind.value}")
        terminal.line(f"  first: {record.first_noted[kind]}", hang=4)
