"""
The recordings in tests/data are what they are said to be: a probe's trace and QEMU's own one tell
the same story.
"""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_DATA = Path(__file__).parent / "data"
_BLOCK = 2 << 20
_QEMU_CALL = re.compile(r"vfio_user_dma_(map|unmap) +iova (0x[0-9a-f]+) size (0x[0-9a-f]+) ")


def _lines(name: str) -> list[str]:
    with gzip.open(_DATA / name, "rt") as file:
        return file.read().splitlines()


def _events(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(f"probe-qemu-{run}.jsonl.gz")]


def _calls_by_probe(run: str) -> list[tuple[str, int, int]]:
    """Return the maps and unmaps that came in, refused ones among them."""
    kinds = {"overlap": "map", "inexact": "unmap"}
    return [
        (kinds.get(event.get("rule", ""), event["event"]), event["iova"], event["size"])
        for event in _events(run)
        if event["event"] in ("map", "unmap") or event.get("rule") in kinds
    ]


def _calls_by_qemu(run: str) -> list[tuple[str, int, int]]:
    found = (_QEMU_CALL.search(line) for line in _lines(f"qemu-{run}.trace.gz"))
    return [(m[1], int(m[2], 16), int(m[3], 16)) for m in found if m]


@pytest.mark.parametrize("run", ["lenient", "exact"])
def test_probe_and_qemu_tell_of_the_same_calls(run: str) -> None:
    calls = _calls_by_probe(run)

    assert len(calls) > 100
    assert calls == _calls_by_qemu(run)


@pytest.mark.parametrize("run", ["lenient", "exact"])
def test_trace_of_a_probe_is_in_order(run: str) -> None:
    events = _events(run)

    assert events[0]["event"] == "start"
    assert events[0]["unmap"] == run
    assert [event["t"] for event in events] == sorted(event["t"] for event in events)


def test_lenient_run_is_clean() -> None:
    counts = Counter(event["event"] for event in _events("lenient"))

    assert counts["connect"] == counts["disconnect"] == 1
    assert not counts["violation"]
    assert not counts["stale"]


def test_exact_run_leaves_windows() -> None:
    events = _events("exact")
    stale = [event for event in events if event["event"] == "stale"]
    rules = Counter(event["rule"] for event in events if event["event"] == "violation")

    assert [event["size"] for event in stale] == [_BLOCK] * 64
    assert {(event["unmap_iova"], event["unmap_size"]) for event in stale} == {
        (0x108000000, 64 * _BLOCK)
    }
    # The unmap, the map that finds it there still, and how QEMU takes that map back: two unmaps.
    assert rules == {"inexact": 3, "overlap": 1, "expectation": 2}
    assert events[-1]["event"] == "summary"
    assert events[-1]["stale_windows"] == 64


def test_qemu_tells_nothing_of_a_refused_unmap() -> None:
    around = _calls_by_qemu("exact")
    refused = ("unmap", 0x108000000, 64 * _BLOCK)

    assert around.count(refused) == 3
    # Its trace says of each unmap what was asked for, and has no event for the answer.
    names = {line.split()[1] for line in _lines("qemu-exact.trace.gz")}
    assert not [name for name in names if "fail" in name or "error" in name]
