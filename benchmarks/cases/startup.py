# SPDX-License-Identifier: Apache-2.0
"""The CPU time of ``import ramblock`` and of ``ramblock --help``, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from harness.context import Context
from harness.ours import OURS
from harness.rows import Row, Samples

__all__ = ["CASE", "HELP", "IMPORT", "run", "used"]

CASE = "start-up"
IMPORT, HELP = "import ramblock", "ramblock --help"

PYTHON = "python alone"

# The import by itself, as the process sees it; starting Python is the other contender.
_TIME_THE_IMPORT = """
from time import thread_time_ns
before = thread_time_ns()
import ramblock
print(thread_time_ns() - before)
"""


def run(context: Context) -> Iterator[Row]:
    """Yield a row for the import and one for the help."""
    context.say(CASE)
    script = Path(sys.executable).parent / "ramblock"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "ramblock"]
    samples = {IMPORT: Samples(), HELP: Samples()}
    # The first of each is not counted: it compiles what is not compiled yet.
    for index in range(context.choose(8, 41)):
        imported = float(_output([sys.executable, "-c", _TIME_THE_IMPORT]))
        helped = used([*command, "--help"])
        alone = used([sys.executable, "-c", "pass"])
        if index:
            samples[IMPORT].add(OURS, [imported])
            samples[HELP].add(OURS, [helped])
            for entry in samples.values():
                entry.add(PYTHON, [alone])
    for what, entry in samples.items():
        yield entry.row(CASE, {"what": what})


def used(command: Sequence[str]) -> float:
    """Tell the CPU time of a process, in nanoseconds; the kernel's part of it too."""
    before = getrusage(RUSAGE_CHILDREN)
    _output(command)
    after = getrusage(RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e9


def _output(command: Sequence[str]) -> str:
    # An installed package is compiled; so let Python keep what it compiles.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout
