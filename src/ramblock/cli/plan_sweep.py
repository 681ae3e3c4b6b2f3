# SPDX-License-Identifier: Apache-2.0
"""``ramblock plan --sweep``: many guests, a table, a picture."""

from __future__ import annotations

import argparse
import io
import os
from collections import Counter
from contextlib import ExitStack
from typing import IO

from ramblock.cli.outputs import OutputFile, open_page
from ramblock.cli.plan_guest import guest_of, limits_of
from ramblock.cli.progress import Progress
from ramblock.cli.terminal import err, out
from ramblock.errors import UsageError
from ramblock.plan.page import write_sweep
from ramblock.plan.row import Verdict
from ramblock.plan.sweep import Sweep, parse_axis
from ramblock.plan.sweep_run import Swept, run_on_cluster, run_sweep
from ramblock.plan.table import check_table, write_csv, write_table

__all__ = ["start_sweep"]

_INTERRUPTED = 130
_HOPELESS = (Verdict.REFUSED, Verdict.IMPOSSIBLE)
# Columns of the table that can go along a picture, by the axis that makes them.
_ALONG = {
    "memory": "memory",
    "vcpus": "vcpus",
    "numa": "numa_nodes",
    "virtio-mem": "virtio_mem",
    "conversions": "conversions",
    "dma-entry-limit": "dma_entry_limit",
    "backing": "backing_page",
}


def start_sweep(arguments: argparse.Namespace) -> int:
    """Plan for all guests; return the exit code."""
    sweep = _sweep_of(arguments)
    along = next((_ALONG[name] for name, _ in sweep.axes if name in _ALONG), None)
    with ExitStack() as stack:
        table = plot = None
        if arguments.table is not None:
            check_table(arguments.table)
            table = stack.enter_context(OutputFile("--table", arguments.table))
        if arguments.plot is not None:
            _check_plot(along)
            plot = stack.enter_context(open_page("--plot", arguments.plot))
        swept = _run(arguments, sweep)
        _write(arguments, swept, table)
        if plot is not None and along is not None:
            write_sweep(plot, swept.rows, along, sweep.limits)
    _tell(arguments, len(sweep), swept)
    if not swept.complete:
        return _INTERRUPTED
    return int(all(row["verdict"] in _HOPELESS for row in swept.rows))


def _run(arguments: argparse.Namespace, sweep: Sweep) -> Swept:
    total = 0
    with Progress(quiet=arguments.quiet) as progress:

        def update(more: int) -> None:
            nonlocal total
            total += more
            progress.show(lambda _: f"{total:,} of {len(sweep):,} guests", total, len(sweep))

        if arguments.scheduler is not None:
            return run_on_cluster(sweep, arguments.scheduler, update)
        return run_sweep(sweep, arguments.jobs or len(os.sched_getaffinity(0)), update)


def _sweep_of(arguments: argparse.Namespace) -> Sweep:
    axes = [parse_axis(text) for text in arguments.sweep]
    for name in ("policy", "target"):
        value = getattr(arguments, name)
        if value is not None:
            axes.append((name, (value,)))
    sweep = Sweep(guest=guest_of(arguments), limits=limits_of(arguments), axes=tuple(axes))
    sweep.check()
    return sweep


def _check_plot(along: str | None) -> None:
    if along is None:
        raise UsageError(
            "--plot has nothing to go along", expected=f"--sweep of one of {', '.join(_ALONG)}"
        )


def _write(arguments: argparse.Namespace, swept: Swept, table: IO[bytes] | None) -> None:
    if table is not None:
        write_table(table, arguments.table.suffix, swept.rows)
    elif not arguments.json:
        text = io.StringIO()
        write_csv(text, swept.rows)
        terminal = out()
        for line in text.getvalue().splitlines():
            terminal.verbatim(line)
    if arguments.json:
        fields: dict[str, object] = {"complete": swept.complete, "rows": swept.rows}
        out().json("ramblock.plan-sweep", 1, fields)


def _tell(arguments: argparse.Namespace, wanted: int, swept: Swept) -> None:
    """Sum up, on stderr: the table may be on stdout."""
    if arguments.quiet:
        return
    terminal = err()
    verdicts = Counter((row["policy"], row["target"], row["verdict"]) for row in swept.rows)
    terminal.line(f"{swept.guests:,} of {wanted:,} guests")
    for (policy, target, verdict), count in sorted(verdicts.items(), key=str):
        terminal.line(f"{policy}, {target}: {verdict}: {count:,}")
    if not swept.complete:
        terminal.line("interrupted: the table has what was done")
