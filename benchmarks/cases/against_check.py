# SPDX-License-Identifier: Apache-2.0
"""
``--against``: ``ramblock check``, this version beside another one, on the same files.

The recordings of ``tests/data``, and made traces of each format: conversions of 16 KiB with one map
each, and of 2 MiB whose maps come in runs. New processes, in turn, by CPU time; small files are
checked again and again in one process. ``grep -c`` of the same file stands beside them.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

from cases.against import OTHER, OWN
from cases.check import small_conversions
from cases.startup import used
from harness.checks import Checked, check_in_turn
from harness.context import Context
from harness.rows import Row, Samples
from harness.versions import OWN_SOURCE
from harness.vmm_traces import TRACES, live_runs

__all__ = ["CASE", "MEMORY", "run"]

CASE = "check, this version against another"
MEMORY = "check: memory, this version against another"
_GREP = "grep -c"
_DATA = Path(__file__).parents[2] / "tests" / "data"
_RECORDED = (".txt.gz", ".trace.gz", ".simpletrace.gz", ".jsonl.gz")
_LIVE = 50_000


def run(context: Context, other: Path) -> Iterator[Row]:
    """
    Yield a row for each recording and each made trace, and one for the memory of live runs.

    :param other: The folder that has the other package ``ramblock`` in it.
    """
    context.say(CASE)
    files = _write(context)
    samples = [Samples() for _ in files]
    ratios: list[list[float]] = [[] for _ in files]
    rates: list[list[float]] = [[] for _ in files]
    for _ in range(context.choose(2, 8)):
        own, others = check_in_turn(OWN_SOURCE, files), check_in_turn(other, files)
        for index, path in enumerate(files):
            samples[index].add(OWN, [_each(own[index])])
            samples[index].add(OTHER, [_each(others[index])])
            samples[index].add(_GREP, [used(["grep", "-c", "map", str(path)])])
            ratios[index].append(_each(others[index]) / _each(own[index]))
            rates[index].append(own[index].events * 1e9 / _each(own[index]))
    for index, path in enumerate(files):
        low, _, high = quantiles(ratios[index], n=4)
        yield samples[index].row(
            CASE,
            {"file": path.name, "KB": f"{path.stat().st_size / 1000:,.0f}"},
            facts={
                "events/s": max(rates[index]),
                "by round, lower quartile": low,
                "upper quartile": high,
            },
        )
    yield _memory(context, other)


def _each(checked: Checked) -> float:
    """Return the time of a check, but for a first and slower part."""
    return min(checked.times)


def _write(context: Context) -> list[Path]:
    files = []
    for path in sorted(_DATA.iterdir()):
        if path.name.endswith(_RECORDED) and not path.name.startswith("clock-"):
            file = context.folder / path.name.removesuffix(".gz")
            file.write_bytes(gzip.decompress(path.read_bytes()))
            files.append(file)
    for name, data in small_conversions(context.choose(2, 8)):
        file = context.folder / f"{name}, one by one"
        file.write_bytes(data)
        files.append(file)
    for name, made in TRACES.items():
        file = context.folder / f"{name}, in runs"
        file.write_bytes(made(context.choose(100, 1500)))
        files.append(file)
    return files


def _memory(context: Context, other: Path) -> Row:
    few, many = context.folder / "a live run", context.folder / "live runs"
    few.write_bytes(live_runs(1))  # what it imports, and patterns, are no run's
    many.write_bytes(live_runs(_LIVE))
    samples = Samples()
    own, others = (check_in_turn(each, [few, many])[1] for each in (OWN_SOURCE, other))
    samples.add(OWN, own.times)
    samples.add(OTHER, others.times)
    return samples.row(
        MEMORY,
        {"live runs": f"{_LIVE:,}"},
        facts={
            "bytes a run": own.peak / _LIVE,
            "the other": others.peak / _LIVE,
        },
    )
