"""A reboot in a workload: the run resets its guest, and looks for anything of the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ramblock import GuestMemory
from ramblock.check import CheckOptions, check_file
from ramblock.run import Run, RunReport, Scenario
from ramblock.run.scenario import Devices, Guest, Job, Size
from ramblock.run.tally import Outcome, Tally
from ramblock.testing import ViolationKind
from ramblock.units import MIB


class Silent:
    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        pass


def execute(trace: Path | None = None, devices: Devices | None = None, **job: Any) -> RunReport:
    settings: dict[str, Any] = {"conversions": 3000, "workload": "reboot", "seed": 5, **job}
    guest = Guest(memory=Size(256 * MIB), kind="script")
    scenario = Scenario(guest=guest, devices=devices or Devices(), run=Job(**settings))
    return Run(scenario, trace).execute(Silent())


@pytest.mark.parametrize("policy", ["page", "run"])
def test_reboots_are_clean(policy: str) -> None:
    report = execute(devices=Devices(policy=policy))  # type: ignore[arg-type]  # one of its words
    assert report.tally.by_action["reboot"] > 5
    assert report.verifier.clean, report.verifier.violations()
    assert not report.device_errors
    assert report.devices_total().faults_own == 0


def test_the_same_run_again_from_its_trace(tmp_path: Path) -> None:
    trace = tmp_path / "reboot.jsonl"
    report = execute(trace)
    again = execute(workload=str(trace))
    assert again.tally.by_action["reboot"] == report.tally.by_action["reboot"] > 5
    assert again.verifier.clean
    assert (again.tally.changed_bytes, again.tally.outcomes[Outcome.DONE]) == (
        report.tally.changed_bytes,
        report.tally.outcomes[Outcome.DONE],
    )


def test_an_audit_of_its_trace_finds_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "reboot.jsonl"
    execute(trace)
    result = check_file(str(trace), CheckOptions())
    assert result.failures() == 0


def test_a_refused_reset_leaves_the_guest_running() -> None:
    report = execute(inject="unmap:700,unmap:1500,attribute:900")
    assert report.verifier.clean, report.verifier.violations()
    assert not report.poisoned


def test_a_reset_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuestMemory, "reset", lambda self, vm=None, private=None: 0)
    report = execute()
    assert report.verifier.counts[ViolationKind.SURVIVED] > 0


def test_a_reset_that_frees_and_leaves_mappings_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As QEMU 11.1.3 does it."""

    def reset(memory: GuestMemory, vm: object = None, private: object = None) -> int:
        for section in memory.sections:
            attributes = section.block.attributes  # type: ignore[attr-defined]
            if attributes is not None:
                memory._vm.set_memory_attributes(section.gpa, section.size, True)  # type: ignore[union-attr]
        return 0

    monkeypatch.setattr(GuestMemory, "reset", reset)
    report = execute()
    counts = report.verifier.counts
    assert counts[ViolationKind.STALE] > 0
    assert counts[ViolationKind.DEVICE_REACHED_PRIVATE] + counts[ViolationKind.SURVIVED] > 0
