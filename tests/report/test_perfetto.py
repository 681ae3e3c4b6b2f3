"""A trace for the Perfetto UI: JSON that it can open, with the numbers of the audit."""

import json
from pathlib import Path
from typing import Any

import pytest

from ramblock.cli import main
from trace_samples import DATA


def _events(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    path = tmp_path / "trace.json"
    main(["check", str(DATA / name), "--perfetto", str(path)])
    events: list[dict[str, Any]] = json.loads(path.read_bytes())["traceEvents"]
    # What the format asks of every event: https://perfetto.dev/docs/getting-started/other-formats
    for event in events:
        assert event["ph"] in "MXCibe"
        assert isinstance(event["name"], str)
        assert event["pid"] == 1
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    return events


@pytest.mark.usefixtures("capsys")
def test_a_clean_run(tmp_path: Path) -> None:
    events = _events(tmp_path, "run-soft.jsonl.gz")
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 400
    assert {event["name"] for event in slices} == {"to private", "to shared"}
    last = {event["name"]: event["args"]["bytes"] for event in events if event["ph"] == "C"}
    assert last["shared bytes"] > 0
    # At the end the targets are gone.
    assert last["mapped bytes: iommu0"] == last["mapped bytes: iommu1"] == 0
    found = [event["name"] for event in events if event.get("cat") == "finding"]
    assert set(found) == {"fault"}


@pytest.mark.usefixtures("capsys")
def test_counters_never_fall_below_zero(tmp_path: Path) -> None:
    for name in ("run-soft-uncoordinated.jsonl.gz", "ftrace-type1.txt.gz", "qemu-exact.trace.gz"):
        counters = [event for event in _events(tmp_path, name) if event["ph"] == "C"]
        assert len(counters) > 10
        assert min(event["args"]["bytes"] for event in counters) >= 0


@pytest.mark.usefixtures("capsys")
def test_findings_are_instants_and_slices(tmp_path: Path) -> None:
    events = _events(tmp_path, "probe-qemu-exact.jsonl.gz")
    instants = [event for event in events if event["ph"] == "i" and event["cat"] == "finding"]
    assert len([event for event in instants if event["name"] == "stale"]) == 64
    begun = {event["id"]: event for event in events if event["ph"] == "b"}
    ended = {event["id"]: event for event in events if event["ph"] == "e"}
    assert len(begun) == 64
    assert begun.keys() == ended.keys()
    assert all(ended[number]["ts"] > event["ts"] for number, event in begun.items())
    failures = [event["name"] for event in instants if event["args"]["failure"]]
    assert failures == ["stale"] * 64
