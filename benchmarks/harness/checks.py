# SPDX-License-Identifier: Apache-2.0
"""
``check_file`` of two versions in one run: the same files in child processes, in turn.

Run as a program, this module is the child: it checks with whatever ``import ramblock`` finds. So it
keeps to names that any version has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import process_time_ns
from typing import NamedTuple

import ramblock
from ramblock.check import check_file

__all__ = ["Checked", "check_in_turn"]

_BENCHMARKS = Path(__file__).parents[1]
#: A file is checked again and again for so long, and is not where one check takes longer.
_LONG_ENOUGH_NS = 150_000_000
_MOST = 100


class Checked(NamedTuple):
    """What a child measured of one file."""

    times: list[float]
    """Nanoseconds of CPU time, one for each check."""
    events: int
    peak: int
    """Bytes that the process had at most, beyond those it had before."""


def check_in_turn(source: Path, files: Sequence[Path]) -> list[Checked]:
    """
    Check files with the version in *source*, in one new process.

    :param source: The folder that has the package ``ramblock`` in it.
    :raises RuntimeError: The child imported another ramblock, or failed; the text says why.
    """
    path = os.pathsep.join(str(entry) for entry in (source, _BENCHMARKS))
    done = subprocess.run(
        [sys.executable, "-m", "harness.checks", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"the check failed with {source}:\n{done.stderr}")
    answer = json.loads(done.stdout)
    if not Path(answer["ramblock"]).resolve().is_relative_to(source.resolve()):
        raise RuntimeError(f"the check imported {answer['ramblock']}, expected one of {source}")
    return [Checked(*each) for each in answer["checked"]]


def _check(path: str) -> Checked:
    before = getrusage(RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    events = 0
    while sum(times) < _LONG_ENOUGH_NS and len(times) < _MOST:
        start = process_time_ns()
        events = check_file(path).events
        times.append(process_time_ns() - start)
    # The first imports, and compiles patterns.
    peak = (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024
    return Checked(times[1:] or times, events, peak)


def _child() -> None:
    checked = [_check(path) for path in sys.argv[1:]]
    json.dump({"ramblock": ramblock.__file__, "checked": checked}, sys.stdout)


if __name__ == "__main__":
    _child()
