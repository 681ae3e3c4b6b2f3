# SPDX-License-Identifier: Apache-2.0
"""
Two versions of ramblock in one run: the same loop in child processes, in turn.

Each child has its own source tree.

Run as a program, this module is the child: it converts with whatever ``import ramblock`` finds. So
it and all it imports keep to names that any version has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import ramblock
from harness.gauge import read_gauge
from harness.loop import DIRECTIONS, ConvertLoop, spread_places
from harness.ours import confidential_guest
from ramblock.units import GIB, KIB

__all__ = ["OWN_SOURCE", "TARGETS", "Turn", "take_turn"]

#: The source tree that these benchmarks belong to.
OWN_SOURCE = Path(__file__).parents[2] / "src"

#: Numbers of targets that are measured.
TARGETS = (1, 2)

_BENCHMARKS = Path(__file__).parents[1]

# Of groups there and back, after the ones that warm up. More children rather than longer ones:
# where a process gets its memory makes a difference between two runs of the same code.
_PAIRS = 60
_WARM_UP = 5


class Turn(NamedTuple):
    """What a child measured."""

    times: dict[tuple[int, str], list[float]]
    """By number of targets and direction: nanoseconds per conversion, a sample per group."""
    gauge: list[float]


def take_turn(source: Path) -> Turn:
    """
    Measure the version in *source* in a new process.

    :param source: The folder that has the package ``ramblock`` in it.
    :raises RuntimeError: The child imported another ramblock, or failed; the text says why.
    """
    path = os.pathsep.join(str(entry) for entry in (source, _BENCHMARKS))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-m", "harness.versions"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"the loop failed with {source}:\n{done.stderr}")
    answer = json.loads(done.stdout)
    if not Path(answer["ramblock"]).resolve().is_relative_to(source.resolve()):
        raise RuntimeError(f"the loop imported {answer['ramblock']}, expected one of {source}")
    times = {(targets, to): times for targets, to, times in answer["times"]}
    return Turn(times, answer["gauge"])


def _child() -> None:
    gauge: list[float] = []
    times: dict[tuple[int, str], list[float]] = {
        (count, to.value): [] for count in TARGETS for to in DIRECTIONS
    }
    with ExitStack() as stack:
        loops = {}
        for count in TARGETS:
            memory = stack.enter_context(confidential_guest(64 * GIB, count))
            loops[count] = ConvertLoop(memory, spread_places(4 * KIB))
            loops[count].turn(_WARM_UP)
        for _ in range(_PAIRS):
            for count, loop in loops.items():
                for to, samples in zip(DIRECTIONS, loop.turn(1), strict=True):
                    times[count, to.value] += samples
            gauge.append(read_gauge())
    json.dump(
        {
            "ramblock": ramblock.__file__,
            "gauge": gauge,
            "times": [(*key, samples) for key, samples in times.items()],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    _child()
