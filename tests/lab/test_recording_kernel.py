"""
`ramblock run` on real parts, recorded twice: by the run itself, and by the kernel's own
tracepoints.

The audit has to find the same in both. With RAMBLOCK_RECORD=FOLDER each test leaves its recordings
there: that is how those in tests/data were made.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from ftrace_recording import recorded
from ramblock.check import CheckOptions, check_file, check_merged
from ramblock.cli import main
from ramblock.trace.findings import FindingKind
from ramblock.trace.result import AuditResult

_SIZES = ("--memory", "64M", "--conversions", "60")


def _keep(path: Path, name: str) -> None:
    if wanted := os.environ.get("RAMBLOCK_RECORD"):
        with path.open("rb") as source, gzip.open(Path(wanted) / f"{name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)


def _run(folder: Path, name: str, *options: str) -> tuple[int, Path, Path]:
    """Run; return the exit code, the run's own trace, and the kernel's."""
    own, kernel = folder / f"run-{name}.jsonl", folder / f"ftrace-{name}.txt"
    with recorded(kernel):
        code = main(["run", "--guest", "kvm", *_SIZES, "-q", "--trace", str(own), *options])
    _keep(own, own.name)
    _keep(kernel, kernel.name)
    return code, own, kernel


def _pages(result: AuditResult, kinds: Sequence[FindingKind]) -> set[int]:
    """Pages in findings of these kinds."""
    return {
        page
        for finding in result.findings
        if finding.kind in kinds
        for page in range(finding.start >> 12, finding.end >> 12)
    }


def _events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "iommu"),
    [("type1", "type1"), ("iommufd", "iommufd-cutting"), ("iommufd-native", "iommufd-native")],
)
def test_a_clean_run_is_clean_in_both_recordings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, iommu: str
) -> None:
    code, own, kernel = _run(tmp_path, name, "--iommu", iommu)
    assert code == 0, capsys.readouterr().out
    ours, theirs = check_file(str(own)), check_file(str(kernel))
    for result in (ours, theirs):
        assert (result.error, result.failures(), result.cannot_tell) == (None, 0, [])
        # The devices are told to touch what they must not: the faults are the IOMMU's answer.
        others = [each for each in result.findings if each.kind is not FindingKind.FAULT]
        assert others == []
        assert result.unknown_lines == 0
    counts = theirs.by_event
    # The kernel's recording also has what the run does before its trace begins and after it ends.
    converted = sum(1 for event in _events(own) if event["event"] == "attributes")
    assert counts["kvm_vm_set_mem_attributes"] >= converted > 0
    assert counts["kvm_hypercall"] > 40
    assert counts["kvm_entry"] > counts["kvm_hypercall"]
    assert min(counts["map"], counts["unmap"]) > 0


def test_both_recordings_show_the_stale_mappings_of_a_run_without_coordination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Everything is mapped at boot, and nobody unmaps what becomes private: the real IOMMU lets the
    device reach it.
    """
    options = ("--iommu", "type1", "--uncoordinated")
    code, own, kernel = _run(tmp_path, "uncoordinated", *options)
    assert code == 1, capsys.readouterr().out
    ours, theirs = check_file(str(own)), check_file(str(kernel))
    stale = [FindingKind.STALE]
    assert ours.counts[FindingKind.STALE].count > 0
    assert theirs.counts[FindingKind.STALE].count > 0
    assert _pages(ours, stale) == _pages(theirs, stale)


def test_the_two_recordings_can_be_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the same clock, so the run's conversions stand among the kernel's mappings."""
    code, own, kernel = _run(tmp_path, "merged", "--iommu", "iommufd")
    assert code == 0, capsys.readouterr().out
    result = check_merged([str(own), str(kernel)], CheckOptions(), [0, 0])
    assert (result.failures(), result.error) == (0, None)
    assert len(result.targets) >= 3
