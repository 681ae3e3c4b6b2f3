# SPDX-License-Identifier: Apache-2.0
"""
The tests of ``tests/lab``: those in ``host/`` here, the others in the VM, once for each variant.

Which variants a test is for is the test's own business (``tests/lab/conftest.py``). A run without
tests is a failure.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import guest, junit
from lab.build import Lab
from lab.double import DOUBLE_VARIABLE
from lab.errors import EXIT_LAB, LostVmError
from lab.junit import Counts
from lab.progress import clock
from lab.recorders import PROGRAMS, RECORDERS_VARIABLE
from lab.variants import VARIANTS
from lab.vm import Machine, Work

__all__ = [
    "HOST",
    "REPOSITORY",
    "Outcome",
    "Part",
    "environment",
    "exit_code",
    "host_command",
    "parts",
    "places",
    "run_host",
    "run_variant",
    "summary",
    "work_for",
]

HOST = "host"
"""The name, among those of variants, of the tests on this machine."""

REPOSITORY = Path(__file__).parent.parent
"""Where the lab, the tests and the package are."""
_TESTS = "tests/lab"
_HOST_TESTS = "tests/lab/host"
# Of pytest's options those that choose tests.
_SELECTING = ("-k", "-m", "--deselect", "--last-failed", "--lf")
_WITH_VALUE = ("-k", "-m", "-p", "-c", "-o", "-W", "--deselect", "--ignore", "--rootdir")
_NO_TESTS = 5  # pytest's exit code
# Told to the tests in the VM as they are here.
_PASSED_ON = ("CI", "HYPOTHESIS_PROFILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tests of one run of pytest."""

    name: str
    """A variant's, or HOST."""
    arguments: Sequence[str]
    """pytest's."""
    may_be_empty: bool
    """Somebody chose tests, and they may all be in other parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the tests of one part."""

    name: str
    counts: Counts
    failed: bool
    """Also true when every test passed but something else was wrong; *remarks* say what."""
    lost: bool = False
    remarks: Sequence[str] = ()


def parts(names: Sequence[str], arguments: Sequence[str]) -> list[Part]:
    """
    Divide pytest's *arguments* among the variants (and HOST) called *names*.

    Paths below ``tests/lab`` choose tests, each in the part where it can run; parts for which that
    leaves none are left out.
    """
    paths, options = _divide(arguments)
    for_host = [path for path in paths if path.startswith(_HOST_TESTS)]
    inside = [path for path in paths if path not in for_host]
    selected = bool(paths) or any(a.startswith(_SELECTING) for a in options)
    found = []
    for name in names:
        chosen, everything = (for_host, _HOST_TESTS) if name == HOST else (inside, _TESTS)
        if paths and not chosen:
            continue
        found.append(
            Part(name=name, arguments=[*options, *(chosen or [everything])], may_be_empty=selected)
        )
    return found


def _divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    # Paths below tests/lab, however they are written, and everything else. The value of an option
    # is no path.
    paths, options = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        path = (
            os.path.relpath(argument, REPOSITORY)
            if Path(argument).is_absolute()
            else os.path.normpath(argument)
        )
        if path.startswith(_TESTS) and before not in _WITH_VALUE:
            paths.append(path)
        else:
            options.append(argument)
    return paths, options


def run_host(lab: Lab, part: Part) -> Outcome:
    """Run the tests that need the lab's kernel or QEMU but not the VM."""
    environment = dict(os.environ)
    if lab.double is not None:
        environment[DOUBLE_VARIABLE] = str(lab.double)
    if lab.recorders is not None:
        environment[RECORDERS_VARIABLE] = str(lab.recorders / PROGRAMS)
    if lab.headers is not None:
        environment |= {
            "RAMBLOCK_LAB_HEADERS": str(lab.headers),
            "RAMBLOCK_LAB_KERNEL": str(lab.kernel),
            "RAMBLOCK_LAB_QEMU": str(lab.qemu),
            "RAMBLOCK_LAB_BUSYBOX": str(lab.busybox),
            "RAMBLOCK_REQUIRE": "lab_host",
        }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*host_command(part), f"--junit-xml={report}"]
        status = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
        return _outcome(part, status, junit.read(report))


def run_variant(machine: Machine, part: Part, *, timeout: float) -> Outcome:
    """Run the tests inside the VM; a VM that was lost is an outcome too."""
    counts: Counts | None = None

    def collect(exchange: Path) -> None:
        _keep_recordings(exchange)
        nonlocal counts
        counts = junit.read(exchange / "report.xml")

    try:
        result = machine.run(work_for(part, timeout), show=_show, collect=collect)
    except LostVmError as error:
        return Outcome(
            name=part.name, counts=counts or Counts(), failed=True, lost=True, remarks=[str(error)]
        )
    outcome = _outcome(part, result.status, counts)
    times = f"booted in {clock(result.boot_seconds)}, tests took {clock(result.seconds)}"
    remarks = [
        *outcome.remarks,
        *(f"the kernel is broken: {line}" for line in result.broken),
        *(f"the kernel complained: {line}" for line in result.dubious),
        f"{times}; log: {result.log}",
    ]
    failed = outcome.failed or bool(result.broken)
    return Outcome(name=part.name, counts=outcome.counts, failed=failed, remarks=remarks)


def host_command(part: Part) -> list[str]:
    """Return the command that runs the tests on this machine."""
    return [sys.executable, "-m", "pytest", *part.arguments]


def work_for(part: Part, timeout: float) -> Work:
    """Return what the VM has to do to run the tests."""
    python = Path(sys.executable)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--ignore={_HOST_TESTS}"]
    command += [f"--junit-xml={guest.EXCHANGE}/report.xml", *part.arguments]
    return Work(
        command=shlex.join(command),
        name="test",
        directory=REPOSITORY,
        places=places(),
        environment=environment() | _recording() | {"RAMBLOCK_REQUIRE": "lab,kvm,root"},
        timeout=timeout,
    )


def _recording() -> dict[str, str]:
    """Let tests leave recordings, if wanted, in the folder that the host sees too."""
    return {"RAMBLOCK_RECORD": guest.EXCHANGE} if os.environ.get("RAMBLOCK_RECORD") else {}


def _keep_recordings(exchange: Path) -> None:
    if folder := os.environ.get("RAMBLOCK_RECORD"):
        for recording in exchange.glob("*.gz"):
            shutil.copy(recording, folder)


def places() -> list[Path]:
    """Return the folders that the guest must see: repository, our Python and its environment."""
    return list(
        dict.fromkeys(
            (REPOSITORY.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
        )
    )


def environment() -> dict[str, str]:
    """Return the environment for Python programs of this repository in the VM."""
    return {
        "PATH": f"{Path(sys.executable).parent}"
        ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",  # the host's files cannot be written to
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "RAMBLOCK_LAB_VARIANTS": ",".join(VARIANTS),
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the closing lines: the remarks, then counts for each outcome and for all together."""
    lines = [f"{outcome.name}: {remark}" for outcome in outcomes for remark in outcome.remarks]
    lines += [f"{outcome.name}: {outcome.counts}" for outcome in outcomes]
    total = Counts(
        *(sum(column) for column in zip(*(outcome.counts for outcome in outcomes), strict=True))
    )
    return "\n".join([*lines, str(total)])


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 if all is well, 1 if a test failed or none ran; the lab's own for a lost VM."""
    if any(outcome.lost for outcome in outcomes):
        return 1 if any(outcome.counts.failed for outcome in outcomes) else EXIT_LAB
    ran = any(outcome.counts.passed for outcome in outcomes)
    return 0 if ran and not any(outcome.failed for outcome in outcomes) else 1


def _outcome(part: Part, status: int, counts: Counts | None) -> Outcome:
    remarks = []
    if counts is None:
        remarks.append(f"pytest wrote no report; its exit code is {status}")
        counts = Counts()
    elif not counts.passed + counts.failed and not part.may_be_empty:
        remarks.append("no test ran")
    elif counts.skipped and part.name != HOST:
        remarks.append(
            f"{counts.skipped} tests were skipped: what is skipped in the lab should have run"
        )
    elif status not in (0, 1, _NO_TESTS):
        remarks.append(f"pytest's exit code is {status}")
    failed = bool(remarks) or bool(counts.failed) or status == 1
    return Outcome(name=part.name, counts=counts, failed=failed, remarks=remarks)


def _show(line: str) -> None:
    print(line, flush=True)
