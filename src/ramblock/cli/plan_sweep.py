# SPDX-License-Identifier: Apache-2.0
"""``ramblock plan --sweep``: many guests, a table, a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter

from ramblock.cli.plan_guest import guest_of, limits_of
from ramblock.cli.plan_progress import sweeping
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
    if arguments.table is not None:
        check_table(arguments.table)
    if arguments.plot is not None:
        _check_plot(along)
    with sweeping(len(sweep), quiet=arguments.quiet) as progress:
        if arguments.scheduler is not None:
            swept = run_on_cluster(sweep, arguments.scheduler, progress)
        else:
            jobs = arguments.jobs or len(os.sched_getaffinity(0))
            swept = run_sweep(sweep, jobs, progress)
    _write(arguments, sweep, swept, along)
    _tell(arguments, len(sweep), swept)
    if not swept.complete:
        return _INTERRUPTED
    return int(all(row["verdict"] in _HOPELESS for row in swept.rows))


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
    from ramblock.report.html import require_plotly

    if along is None:
        raise UsageError(
            "--plot has nothing to go along", expected=f"--sweep of one of {', '.join(_ALONG)}"
        )
    require_plotly()


def _write(arguments: argparse.Namespace, sweep: Sweep, swept: Swept, along: str | None) -> None:
    if arguments.table is not None:
        write_table(arguments.table, swept.rows)
    elif not arguments.json:
        write_csv(sys.stdout, swept.rows)
    if arguments.json:
        print(json.dumps({"complete": swept.complete, "rows": swept.rows}))
    if arguments.plot is not None and along is not None:
        write_sweep(arguments.plot, swept.rows, along, sweep.limits)


def _tell(arguments: argparse.Namespace, wanted: int, swept: Swept) -> None:
    """Sum up, on stderr: the table may be on stdout."""
    if arguments.quiet:
        return
    verdicts = Counter((row["policy"], row["target"], row["verdict"]) for row in swept.rows)
    print(f"{swept.guests:,} of {wanted:,} guests", file=sys.stderr)
    for (policy, target, verdict), count in sorted(verdicts.items(), key=str):
        print(f"{policy}, {target}: {verdict}: {count:,}", file=sys.stderr)
    if not swept.complete:
        print("interrupted: the table has what was done", file=sys.stderr)
