# SPDX-License-Identifier: Apache-2.0
"""The programs in C: built here, run on recorded requests, results read back."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FLAGS", "Baseline", "Outcome", "build"]

#: As a distribution builds a VMM.
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra")

_SOURCES = Path(__file__).parent.parent / "baseline"


@dataclass(slots=True)
class Outcome:
    """What a run printed; driver.c says what each means."""

    clock: float = 0
    maps: int = 0
    unmaps: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Of the timed groups, in order; CPU time in nanoseconds per request, without the clock."""
    replays: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Outcome:
        """Read the output of a run."""
        outcome = cls()
        for line in text.splitlines():
            match line.split():
                case ["clock", cost]:
                    outcome.clock = float(cost)
                case ["calls", maps, unmaps]:
                    outcome.maps, outcome.unmaps = int(maps), int(unmaps)
                case ["run", start, end]:
                    outcome.runs.append((int(start), int(end)))
                case ["time", elapsed, count]:
                    outcome.times.append(max(float(elapsed) - outcome.clock, 0) / int(count))
                case ["replay", elapsed]:
                    outcome.replays.append(float(elapsed))
                case _:
                    raise ValueError(f"the baseline printed {line!r}")
        return outcome


@dataclass(frozen=True, slots=True)
class Baseline:
    """A program in C."""

    name: str
    """In the tables."""
    program: Path
    joins_unmaps: bool
    """In a mixture: one unmap call per run (True), or per page."""

    def run(self, requests: Path, *, system_calls: bool = False, replays: int = 0) -> Outcome:
        """
        Run it on recorded requests.

        :param system_calls: Whether each map and unmap goes to the kernel and back; otherwise they
            only count.
        :param replays: How often what is shared at the end is told to a new listener.
        """
        callbacks = "syscall" if system_calls else "noop"
        done = subprocess.run(
            [self.program, requests, callbacks, str(replays)],
            check=True,
            capture_output=True,
            text=True,
        )
        return Outcome.parse(done.stdout)


def build(folder: Path) -> tuple[Baseline, ...]:
    """
    Compile the baselines into *folder*.

    :raises FileNotFoundError: There is no gcc.
    :raises subprocess.CalledProcessError: It failed; what it said is on stderr.
    """
    if shutil.which("gcc") is None:
        raise FileNotFoundError("the baselines are compiled with gcc, and there is none")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("bitmap_tracker", "byte_tracker"):
        sources = [_SOURCES / f"{name}.c", _SOURCES / "driver.c"]
        subprocess.run(["gcc", *FLAGS, *sources, "-o", folder / name], check=True)
    return (
        Baseline("C bitmap", folder / "bitmap_tracker", joins_unmaps=False),
        Baseline("C bytes", folder / "byte_tracker", joins_unmaps=True),
    )
