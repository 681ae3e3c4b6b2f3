# SPDX-License-Identifier: Apache-2.0
"""How long a user waits for ``import ramblock`` and for ``ramblock --help``, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.context import Context
from harness.measure import Row, Summary, timed
from harness.ours import OURS

__all__ = ["CASE", "HELP", "IMPORT", "run"]

CASE = "start-up"
IMPORT, HELP = "import ramblock", "ramblock --help"

PYTHON = "python alone"

# The import by itself, as the process sees it; starting Python is the other contender.
_TIME_THE_IMPORT = """
from time import perf_counter_ns
before = perf_counter_ns()
import ramblock
print(perf_counter_ns() - before)
"""


def run(context: Context) -> Iterator[Row]:
    """Yield a row for the import and one for the help."""
    context.say(CASE)
    script = Path(sys.executable).parent / "ramblock"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "ramblock"]
    times: dict[str, list[float]] = {IMPORT: [], HELP: [], PYTHON: []}
    # The first of each is not counted: it compiles what is not compiled yet.
    for index in range(context.choose(8, 41)):
        imported = float(_output([sys.executable, "-c", _TIME_THE_IMPORT]))
        helped = timed(_output, [*command, "--help"])
        alone = timed(_output, [sys.executable, "-c", "pass"])
        if index:
            times[IMPORT].append(imported)
            times[HELP].append(helped)
            times[PYTHON].append(alone)
    for what in (IMPORT, HELP):
        yield Row(
            case=CASE,
            parameters={"what": what},
            results={OURS: Summary.of(times[what]), PYTHON: Summary.of(times[PYTHON])},
        )


def _output(command: Sequence[str]) -> str:
    # An installed package is compiled; so let Python keep what it compiles.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout
