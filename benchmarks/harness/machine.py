# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import thread_time
from timeit import repeat

from harness.baselines import FLAGS
from harness.measure import CLOCK

__all__ = ["Machine"]

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine, and the versions of what takes part."""

    date: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    gcc: str
    packages: dict[str, str]
    commit: str
    """Of the source tree, ``+`` when it has changes; empty without git."""
    huge_pages: str
    """Transparent huge pages: what the bitmaps of the baselines get."""
    load: tuple[float, float, float]
    """Before the run, over 1, 5 and 15 minutes."""
    clock_ns: float
    """What reading the clock of CPU time costs in Python; subtracted everywhere."""
    call_ns: float
    """What a call of an empty Python function costs."""

    @classmethod
    def here(cls) -> Machine:
        """Describe this one."""
        release = platform.release().partition("-")[0]  # without what a host adds to the version
        return cls(
            date=datetime.now(UTC).date().isoformat(),
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=f"{platform.system()} {release} {platform.machine()}",
            python=f"{platform.python_implementation()} {platform.python_version()}",
            gcc=_output("gcc", "--version").partition("\n")[0] + " " + " ".join(FLAGS[1:3]),
            packages=_packages(),
            commit=_commit(),
            huge_pages=_chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
            load=os.getloadavg(),
            clock_ns=CLOCK,
            call_ns=_call_cost(),
        )

    def one_line(self) -> str:
        """Describe it for the head of a table."""
        packages = f"bitarray {self.packages['bitarray']}"
        return (
            f"{self.cpu}, {self.cores} cores, {self.kernel}, {self.python}, {packages}, {self.gcc}"
        )

    def lines(self) -> Iterator[str]:
        """Describe it for people."""
        yield f"date      {self.date}, commit {self.commit or 'unknown'}"
        yield (
            f"machine   {self.cpu}, {self.cores} cores, {self.memory_bytes / (1 << 30):.0f} GiB,"
            f" huge pages: {self.huge_pages}"
        )
        yield f"system    {self.kernel}, {self.python}, {self.gcc}"
        yield "packages  " + ", ".join(
            f"{name} {version}" for name, version in self.packages.items()
        )
        yield f"load      {', '.join(f'{load:.2f}' for load in self.load)} before"
        yield (
            f"speed     a call of an empty Python function: {self.call_ns:.0f} ns;"
            f" reading the clock of CPU time: {self.clock_ns:.0f} ns, subtracted"
        )


def _packages() -> dict[str, str]:
    """Tell the versions of ramblock and of what it cannot run without."""
    required = [entry for entry in metadata.requires("ramblock") or () if "extra ==" not in entry]
    names = ["ramblock", *(match[0] for entry in required if (match := _NAME.match(entry)))]
    return {name: metadata.version(name) for name in names}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Processor", "cpu model"}:
            return value.strip()
    return platform.machine()


def _nothing() -> None:
    """Do nothing, to be called."""


def _call_cost() -> float:
    """Tell what a call of a Python function costs: how fast this Python is on this machine."""
    return min(repeat(_nothing, timer=thread_time, number=20_000, repeat=9)) / 20_000 * 1e9


def _chosen(file: Path) -> str:
    """Read a choice of the kernel's, which it writes ``one [two] three``."""
    if not file.exists():
        return "none"
    return file.read_text().partition("[")[2].partition("]")[0]


def _commit() -> str:
    here = Path(__file__).parent
    commit = _output("git", "-C", str(here), "rev-parse", "--short", "HEAD").strip()
    changed = _output("git", "-C", str(here), "status", "--porcelain").strip()
    return commit + "+" if commit and changed else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""
