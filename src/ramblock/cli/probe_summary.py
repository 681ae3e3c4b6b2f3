# SPDX-License-Identifier: Apache-2.0
"""What a probe found, at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ramblock.errors import describe_range
from ramblock.probe import Record
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
    }


def print_summary(record: Record) -> None:
    """Print it on stdout; colours only on a terminal."""
    console = Console(highlight=False, soft_wrap=True)
    counts = record.counts
    console.print(
        f"[bold]{record.clients} client{'' if record.clients == 1 else 's'}[/bold],"
        f" {counts['map']:,} maps, {counts['unmap']:,} unmaps;"
        f" at most {record.peak_windows:,} windows with {format_size(record.peak_bytes)}"
    )
    if counts["dma"]:
        console.print(
            f"{counts['dma']:,} accesses of the device ({counts['touch']:,} touches,"
            f" {counts['scribble']:,} scribbles), {counts['fault']:,} faulted"
        )
    _print_stale(console, record)
    _print_violations(console, record)
    if record.clean:
        console.print("[green]Nothing found.[/green]")


def _print_stale(console: Console, record: Record) -> None:
    if not record.stale_count:
        return
    console.print(
        f"[bold red]{record.stale_count:,} stale windows[/bold red]: the client wanted them gone, and the device reached them"
    )
    for stale in list(record.stale)[:_SHOWN]:
        until = (
            "to the end"
            if stale.until_ns is None
            else f"for {(stale.until_ns - stale.since_ns) / 1e9:.3f} s"
        )
        console.print(
            f"  {stale.client}: {describe_range(stale.address, stale.size)}, {until};"
            f" unmap of {describe_range(*stale.unmap)} was refused"
        )
    if record.stale_count > _SHOWN:
        console.print(f"  and {record.stale_count - _SHOWN:,} more")


def _print_violations(console: Console, record: Record) -> None:
    for rule, count in record.broken.most_common():
        console.print(f"[bold red]{count:,} x {rule.value}[/bold red]")
        some = [violation for violation in record.violations if violation.rule is rule]
        for violation in some[:_SHOWN]:
            console.print(f"  {violation}", markup=False)
        if count > _SHOWN:
            console.print(f"  and {count - _SHOWN:,} more")
