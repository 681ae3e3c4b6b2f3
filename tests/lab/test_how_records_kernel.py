"""
The commands of `ramblock check --how` for the kernel's events, as they are printed.

Each records `ramblock run` on a real KVM and IOMMU, once as it should be and once without
coordination, and ends with the check of what it recorded.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.recorders import RECORDERS_VARIABLE
from ramblock.check import check_file
from ramblock.cli import main
from ramblock.cli.check_how import RECIPES
from ramblock.trace.findings import FindingKind

# The recorders are the same on each machine, and slow on this one.
pytestmark = [pytest.mark.lab_variant("amd-iommu"), pytest.mark.slow]

_TRACEFS = Path("/sys/kernel/tracing")
_PATIENCE_SECONDS = 60.0


def _is_on(name: str) -> bool:
    path = _TRACEFS / name
    return path.exists() and path.read_text().startswith("1")


def _last_event_is_on(_: Path) -> bool:
    return _is_on("instances/ramblock/events/kvm/kvm_entry/enable")


def _all_is_on(_: Path) -> bool:
    return all(
        map(_is_on, ("tracing_on", "events/kvm/kvm_entry/enable", "events/iommu/map/enable"))
    )


def _perf_writes(folder: Path) -> bool:
    # Its own wake-ups are no events, so the file's header is all that tells; it opens the events
    # before it writes that, and enables them right after.
    data = folder / "perf.data"
    return data.exists() and data.stat().st_size > 0


_RUNNING: dict[str, Callable[[Path], bool]] = {
    "ftrace": _last_event_is_on,
    "trace-cmd": _all_is_on,
    "perf": _perf_writes,
}


@contextmanager
def _recording(name: str, folder: Path) -> Iterator[list[str]]:
    """Carry out a recipe's start, and at the end its stop; the list gets exit code and output."""
    if name == "ftrace":  # a machine on which tracefs is not mounted yet
        subprocess.run(["umount", _TRACEFS], check=True)
    recipe = RECIPES[name]
    script = f"{recipe.start}\nread -r _\n{recipe.stop}"
    path = f"{os.environ[RECORDERS_VARIABLE]}:{os.environ['PATH']}"
    log = folder / "shell.log"
    with log.open("w") as output:
        shell = subprocess.Popen(
            ["sh", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
        told: list[str] = []
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _RUNNING[name](folder):
                assert shell.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            time.sleep(1)
            yield told
        finally:
            shell.communicate(b"\n", timeout=240)
    told += [str(shell.returncode), log.read_text()]


def _converted(path: Path) -> int:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return sum(1 for event in events if event["event"] == "attributes")


@pytest.mark.parametrize("name", _RUNNING)
@pytest.mark.parametrize("coordinated", [True, False], ids=["clean", "stale"])
def test_recording_has_every_event_and_the_right_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, *, coordinated: bool
) -> None:
    own = tmp_path / "run.jsonl"
    options = ["--memory", "64M", "--conversions", "20", "-q", "--trace", str(own)]
    options += ["--iommu", "type1", *([] if coordinated else ["--uncoordinated"])]
    with _recording(name, tmp_path) as told:
        code = main(["run", "--guest", "kvm", *options])
    assert code == (0 if coordinated else 1), capsys.readouterr().out
    status, output = told

    assert int(status) == (0 if coordinated else 1), output
    assert "this kernel has no" not in output
    assert not (_TRACEFS / "instances/ramblock").exists()
    (recording,) = tmp_path.glob("*.txt.gz")
    result = check_file(str(recording))
    assert result.error is None
    counts = result.by_event
    assert counts["kvm_vm_set_mem_attributes"] >= _converted(own) > 0
    assert counts["kvm_entry"] > counts["kvm_hypercall"] > 10
    assert counts["map"] > 0
    assert (FindingKind.STALE in result.counts) is not coordinated
    assert not re.search(r"\blost\b", output, re.I)
