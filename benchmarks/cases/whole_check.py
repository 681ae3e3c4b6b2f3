# SPDX-License-Identifier: Apache-2.0
"""
``ramblock check``, whole: the CPU time of the process, with and without ``--report``.

The recording is made of QEMU's text as in ``check``; the small one has 4 KB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from cases.check import qemu_text
from cases.startup import used
from harness.context import Context
from harness.rows import Row, Samples

__all__ = ["CASE", "CHECK", "REPORT", "SMALL", "run"]

CASE = "check: the whole command"
CHECK, REPORT, SMALL = "ramblock check", "ramblock check --report", "a recording of 4 KB"

_SMALL_BYTES = 4096


def run(context: Context) -> Iterator[Row]:
    """Yield a row for a recording with and without a report, and one for a small recording."""
    context.say(CASE)
    wanted = context.choose(20_000, 200_000)
    large, small = context.folder / "large.trace", context.folder / "small.trace"
    events = _write(large, wanted)
    small.write_bytes(qemu_text(0)[:_SMALL_BYTES].rpartition(b"\n")[0] + b"\n")
    samples = {each: Samples() for each in (REPORT, SMALL)}
    for index in range(context.choose(2, 6)):
        alone = used(_command(large))
        drawn = used([*_command(large), "--report", str(context.folder / "x.html")])
        little = used(_command(small))
        if index:  # the first compiles what is not compiled yet
            samples[REPORT].add(CHECK, [alone])
            samples[REPORT].add(REPORT, [drawn])
            samples[SMALL].add(CHECK, [little])
    yield samples[REPORT].row(CASE, {"what": REPORT, "events": f"{events:,}"})
    yield samples[SMALL].row(CASE, {"what": SMALL, "events": f"{_lines(small):,}"})


def _command(path: Path) -> list[str]:
    return [sys.executable, "-m", "ramblock", "check", "-q", str(path)]


def _write(path: Path, wanted: int) -> int:
    events = block = 0
    with path.open("wb") as file:
        while events < wanted:
            data = qemu_text(block)
            file.write(data)
            events += data.count(b"\n")
            block += 1
    return events


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
