"""`ramblock run` with a guest on a vCPU, and the choice between that and a script."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ramblock.errors import GuestProgramError, UsageError
from ramblock.guest_program import Command, Operation
from ramblock.kvm import Kvm, MemoryAttributes, VmType
from ramblock.run import Run, RunReport, Scenario
from ramblock.run.machine import enforces_attributes, open_kvm
from ramblock.run.programmed import ProgrammedGuest
from ramblock.run.scenario import Devices, Guest, Job, Size
from ramblock.run.tally import Outcome, Tally
from ramblock.testing import ViolationKind
from ramblock.units import MIB
from require import require_kvm


class _Silent:
    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        pass


def execute(
    *,
    kind: str = "kvm",
    memory: int = 128 * MIB,
    devices: Devices | None = None,
    trace: Path | None = None,
    **job: Any,
) -> RunReport:
    scenario = Scenario(
        guest=Guest(memory=Size(memory), kind=kind),  # type: ignore[arg-type]  # one of its literals
        devices=devices or Devices(),
        run=Job(**{"conversions": 300, **job}),
    )
    return Run(scenario, trace).execute(_Silent())


def essence(report: RunReport) -> tuple[object, ...]:
    tally = report.tally
    return (
        dict(tally.outcomes),
        dict(tally.reasons),
        dict(tally.by_action),
        tally.map_calls,
        tally.unmap_calls,
        report.peak_entries,
        report.state_hash,
    )


# -- on this machine's KVM ------------------------------------------------------------------------


@require_kvm
@pytest.mark.parametrize("workload", ["linux", "firmware", "fragmenter"])
def test_a_guest_on_a_vcpu_asks_for_what_the_script_asks_for(workload: str) -> None:
    report = execute(workload=workload)
    assert report.verifier.clean, report.verifier.violations()
    assert report.exit_code == 0
    assert essence(report) == essence(execute(kind="script", workload=workload))
    assert report.guest.kind == "kvm"
    assert report.guest.call in ("doorbell", "vmcall", "vmmcall")
    total = report.devices_total()
    assert total.accesses > 0
    assert total.faults_own == 0
    assert total.forbidden == total.forbidden_faulted


@require_kvm
def test_its_memory_is_really_touched_and_really_freed() -> None:
    by_script, by_guest = execute(kind="script"), execute()
    # The script uses one page of each buffer; the guest the pages of all that it converts.
    assert by_guest.freed_bytes > 10 * by_script.freed_bytes
    assert by_guest.not_freed_bytes == 0


@require_kvm
def test_one_mapping_per_page_is_clean_too() -> None:
    report = execute(devices=Devices(policy="page"), conversions=100)
    assert report.exit_code == 0
    assert report.verifier.clean


@require_kvm
def test_faults_on_purpose_are_put_back() -> None:
    report = execute(inject="map:3,unmap:7,attribute:11,free:5")
    assert report.injected == {"map": 1, "unmap": 1, "attribute": 1, "free": 1}
    assert report.exit_code == 0
    assert report.tally.outcomes[Outcome.ROLLED_BACK] == 3


@require_kvm
def test_poison_stops_the_vcpu() -> None:
    report = execute(inject="unmap:short:5")
    assert report.poisoned
    assert report.exit_code == 1
    assert report.verifier.clean
    assert report.tally.outcomes[Outcome.POISONED] == 1
    assert report.tally.requests < 300


@require_kvm
def test_without_coordination_the_guest_itself_misses_what_devices_wrote() -> None:
    report = execute(uncoordinated=True, conversions=600)
    assert report.exit_code == 1
    assert report.verifier.counts[ViolationKind.STALE]
    assert report.verifier.counts[ViolationKind.LOST_WRITE]


@require_kvm
def test_a_trace_says_who_asked_and_can_be_run_by_the_other(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    first = execute(trace=path)
    start = json.loads(path.read_text().splitlines()[0])
    assert start["guest"] == "kvm"
    assert start["enforced_by"] == first.guest.enforced_by
    assert start["targets"] == {"iommu0": "software", "iommu1": "software"}
    for kind in ("script", "kvm"):
        again = execute(kind=kind, workload=str(path))
        assert again.state_hash == first.state_hash
        assert again.tally.outcomes == first.tally.outcomes


@require_kvm
def test_a_guest_that_cannot_go_on_gives_everything_back() -> None:
    gc.collect()  # what tests before this one have left must not go meanwhile
    before = set(Path("/proc/self/fd").iterdir())
    scenario = Scenario(guest=Guest(memory=Size(64 * MIB), kind="kvm"), run=Job(conversions=50))
    run = Run(scenario)
    # The next thing it is told is to touch what is not there.
    guest = cast("ProgrammedGuest", run._guest)
    guest._put(Command(Operation.FILL, 1 << 46, 8, 0, 8), None)  # type: ignore[arg-type]  # never looked at
    with pytest.raises(GuestProgramError, match="exception 14 at 0x400000000000"):
        run.execute(_Silent())
    assert not any(device.is_alive() for device in run._devices)
    assert set(Path("/proc/self/fd").iterdir()) == before


@require_kvm
def test_the_command_says_what_was_enforced_and_by_whom() -> None:
    arguments = ["run", "--guest", "kvm", "--memory", "64M", "--conversions", "40", "-q"]
    command = [sys.executable, "-m", "ramblock", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    head = " ".join(done.stdout.split("\n\n")[0].split())
    with Kvm() as kvm:
        if enforces_attributes(kvm):
            assert "type software-protected" in head
            assert "The kernel enforces page states" in head
        else:
            assert "type default; it asks by doorbell" in head
            assert "tracked, not enforced: this KVM does not know private pages" in head
    report = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=120).stdout
    )
    assert report["guest"]["kind"] == "kvm"
    assert report["enforced_by"] in ("KVM", "tracked only: this KVM does not know private pages")


@require_kvm
def test_control_c_in_the_middle_of_a_vcpu_ends_with_the_summary(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    arguments = ["run", "--guest", "kvm", "--memory", "64M", "--conversions", "10000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ramblock", *arguments, "-q", "--json", "--trace", str(trace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (trace.exists() and trace.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    report = json.loads(output)
    assert report["interrupted"]
    assert report["violations"]["count"] == 0


# -- which guest ----------------------------------------------------------------------------------


def _kvm(types: frozenset[VmType], attributes: int, *, has_guest_memfd: bool) -> Any:
    return SimpleNamespace(
        vm_types=types,
        memory_attributes=MemoryAttributes(attributes),
        has_guest_memfd=has_guest_memfd,
        close=lambda: None,
    )


_BOTH, _ONE = frozenset(VmType), frozenset({VmType.DEFAULT})
_PRIVATE = int(MemoryAttributes.KVM_MEMORY_ATTRIBUTE_PRIVATE)


@pytest.mark.parametrize(
    ("kvm", "enforces"),
    [
        (_kvm(_BOTH, _PRIVATE, has_guest_memfd=True), True),
        (_kvm(_ONE, _PRIVATE, has_guest_memfd=True), False),
        (_kvm(_BOTH, 0, has_guest_memfd=True), False),
        (_kvm(_BOTH, _PRIVATE, has_guest_memfd=False), False),
    ],
)
def test_auto_takes_kvm_only_where_it_enforces(
    monkeypatch: pytest.MonkeyPatch, kvm: Any, enforces: bool
) -> None:
    monkeypatch.setattr("ramblock.run.machine.Kvm", lambda: kvm)
    assert enforces_attributes(kvm) is enforces
    chosen, why = open_kvm("auto")
    assert (chosen is kvm) is enforces
    assert why
    assert open_kvm("kvm") == (kvm, "")


def test_without_kvm_auto_is_a_script_and_kvm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Kvm:
        return Kvm("/no/such/kvm")

    monkeypatch.setattr("ramblock.run.machine.Kvm", missing)
    kvm, why = open_kvm("auto")
    assert kvm is None
    assert why.startswith("/no/such/kvm: No such file or directory; load kvm_intel or kvm_amd")
    with pytest.raises(UsageError, match="--guest kvm: /no/such/kvm: No such file") as caught:
        open_kvm("kvm")
    assert caught.value.expected == "--guest script"
    report = execute(kind="auto", memory=64 * MIB, conversions=20)
    assert report.guest.kind == "script"
    assert report.guest.enforced_by == "tracked only: no KVM in this run"
    assert report.as_dict()["guest"]["why"] == why
