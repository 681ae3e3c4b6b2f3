# SPDX-License-Identifier: Apache-2.0
"""
The tests of ``tests/lab``: those in ``host/`` on this machine, all others inside the VM, once for each variant.

Which variants a test is for is the test's own business (``tests/lab/conftest.py``). A run without tests is a failure.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import guest, junit
from lab.build import Lab
from lab.errors import LostVmError
from lab.junit import Counts
from lab.progress import clock
from lab.variants import VARIANTS, Variant
from lab.vm import Machine, Work

__all__ = ["HOST", "Outcome", "run_host", "run_variant", "split_arguments", "summary", "work_for"]

HOST = "host"
"""The name, among those of variants, of the tests on this machine."""

_REPOSITORY = Path(__file__).parent.parent
_TESTS = "tests/lab"
_HOST_TESTS = "tests/lab/host"
# Told to the tests in the VM as they are here.
_PASSED_ON = ("CI", "HYPOTHESIS_PROFILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the tests in one variant, or on the host."""

    name: str
    counts: Counts
    failed: bool
    """Also true when every test passed but something else was wrong; *remarks* say what."""
    lost: bool = False
    remarks: Sequence[str] = ()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divide pytest's arguments into those for everybody, the paths of host tests and the paths of tests in the VM."""
    options, host, inside = [], [], []
    for argument in arguments:
        if argument.startswith(_HOST_TESTS):
            host.append(argument)
        elif argument.startswith(_TESTS):
            inside.append(argument)
        else:
            options.append(argument)
    return options, host, inside


def run_host(lab: Lab, arguments: Sequence[str], *, selected: bool) -> Outcome:
    """
    Run the tests that need the lab's kernel but not the VM.

    :param selected: The arguments choose tests, so that none at all is no failure.
    """
    environment = dict(os.environ)
    if lab.headers is not None:
        environment |= {"RAMBLOCK_LAB_HEADERS": str(lab.headers), "RAMBLOCK_REQUIRE": "lab_headers"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *arguments]
        status = subprocess.run(command, cwd=_REPOSITORY, env=environment, check=False).returncode
        return _outcome(HOST, status, junit.read(report), selected=selected)


def run_variant(
    machine: Machine, arguments: Sequence[str], *, timeout: float, selected: bool
) -> Outcome:
    """Run the tests inside the VM."""
    name = machine.variant.name
    counts: Counts | None = None

    def collect(exchange: Path) -> None:
        nonlocal counts
        counts = junit.read(exchange / "report.xml")

    try:
        result = machine.run(work_for(arguments, timeout), show=_show, collect=collect)
    except LostVmError as error:
        return Outcome(
            name=name, counts=counts or Counts(), failed=True, lost=True, remarks=[str(error)]
        )
    outcome = _outcome(name, result.status, counts, selected=selected)
    remarks = list(outcome.remarks)
    remarks += [f"the kernel is broken: {line}" for line in result.broken]
    remarks += [f"the kernel complained: {line}" for line in result.dubious]
    remarks.append(
        f"booted in {clock(result.boot_seconds)}, tests took {clock(result.seconds)}; log: {result.log}"
    )
    return Outcome(
        name=name,
        counts=outcome.counts,
        failed=outcome.failed or bool(result.broken),
        remarks=remarks,
    )


def work_for(arguments: Sequence[str], timeout: float) -> Work:
    """Return what the VM has to do to run the tests."""
    python = Path(sys.executable)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--ignore={_HOST_TESTS}"]
    command += [f"--junit-xml={guest.EXCHANGE}/report.xml", *arguments]
    return Work(
        command=shlex.join(command),
        name="test",
        directory=_REPOSITORY,
        places=places(),
        environment=environment() | {"RAMBLOCK_REQUIRE": "lab,kvm,root"},
        timeout=timeout,
    )


def places() -> list[Path]:
    """Return the folders that the guest must see: the repository, and the Python that runs us with its environment."""
    return list(
        dict.fromkeys(
            (_REPOSITORY.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
        )
    )


def environment() -> dict[str, str]:
    """Return the environment for Python programs of this repository in the VM."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",  # the host's files cannot be written to
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "RAMBLOCK_LAB_VARIANTS": ",".join(VARIANTS),
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the closing lines: the remarks, then one line of counts for each outcome and one for all together."""
    lines = [f"{outcome.name}: {remark}" for outcome in outcomes for remark in outcome.remarks]
    lines += [f"{outcome.name}: {outcome.counts}" for outcome in outcomes]
    total = Counts(
        *(sum(column) for column in zip(*(outcome.counts for outcome in outcomes), strict=True))
    )
    return "\n".join([*lines, str(total)])


def _outcome(name: str, status: int, counts: Counts | None, *, selected: bool) -> Outcome:
    remarks = []
    # pytest's exit code for "no tests"
    nothing = status == 5 or (counts is not None and not counts.passed + counts.failed)
    if counts is None:
        remarks.append(f"pytest wrote no report; its exit code is {status}")
    elif nothing and not selected:
        remarks.append("no test ran")
    elif status not in (0, 1, 5):
        remarks.append(f"pytest's exit code is {status}")
    counts = counts or Counts()
    failed = bool(remarks) or counts.failed > 0 or status == 1
    return Outcome(name=name, counts=counts, failed=failed, remarks=remarks)


def _show(line: str) -> None:
    print(line, flush=True)
