"""The recordings of tests/data: what the audit finds in each, and what it says it cannot."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ramblock.check import CheckOptions, check_file, check_merged
from ramblock.check.readers import ReaderOptions
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.result import AuditResult
from simpletrace_writer import simpletrace_of
from trace_samples import BLOCK, DATA, qemu_lines, recording

_OPTIONS = CheckOptions(reader=ReaderOptions(virtio_mem_block_size=BLOCK))
_CLEAN = (
    "ftrace-iommufd.txt.gz",
    "ftrace-type1.txt.gz",
    "probe-qemu-lenient.jsonl.gz",
    "qemu-iommufd.simpletrace.gz",
    "qemu-iommufd.trace.gz",
    "qemu-lenient.trace.gz",
    "run-iommufd.jsonl.gz",
    "run-soft.jsonl.gz",
    "run-type1.jsonl.gz",
)


def _check(name: str, options: CheckOptions = _OPTIONS) -> AuditResult:
    result = check_file(str(DATA / name), options)
    assert result.error is None
    assert result.events > 100
    return result


def _pages(result: AuditResult, kind: FindingKind) -> set[int]:
    return {
        page
        for finding in result.findings
        if finding.kind is kind
        for page in range(finding.start >> 12, finding.end >> 12)
    }


def _limits(result: AuditResult) -> str:
    return "\n".join(result.limits)


@pytest.mark.parametrize("name", _CLEAN)
def test_clean(name: str) -> None:
    result = _check(name)
    assert (result.failures(), result.unknown_lines) == (0, 0)
    assert set(result.counts) <= {FindingKind.TRANSITIONAL, FindingKind.FAULT}
    assert sum(target.maps for target in result.targets) > 30
    assert sum(target.unmaps for target in result.targets) > 10


@pytest.mark.parametrize("run", ["lenient", "exact"])
@pytest.mark.parametrize("unmap", [None, "exact"])
def test_text_and_binary_give_the_same_findings(
    tmp_path: Path, run: str, unmap: str | None
) -> None:
    """
    Debian's QEMU has no binary backend, so the binary twin is made from the text
    (tests/simpletrace_writer.py).
    """
    binary = tmp_path / "qemu.bin"
    binary.write_bytes(simpletrace_of(qemu_lines(f"qemu-{run}.trace.gz")))
    options = CheckOptions(unmap=unmap, reader=_OPTIONS.reader)
    ours = check_file(str(binary), options)
    theirs = _check(f"qemu-{run}.trace.gz", options)
    assert [_shape(each) for each in ours.findings] == [_shape(each) for each in theirs.findings]
    assert (ours.counts, ours.limits) == (theirs.counts, theirs.limits)
    assert (FindingKind.STALE in ours.counts) == (unmap == "exact")


def _shape(finding: Any) -> tuple[object, ...]:
    return (
        finding.kind,
        finding.start,
        finding.end,
        finding.since,
        finding.until,
        finding.opened.line,
    )


def test_text_and_binary_of_the_same_run() -> None:
    """
    One run of a QEMU that has both backends: the times are of two clocks, all else is the same.
    """
    text, binary = _check("qemu-iommufd.trace.gz"), _check("qemu-iommufd.simpletrace.gz")
    assert text.findings
    assert {each.kind for each in text.findings} == {FindingKind.TRANSITIONAL}
    shapes = [
        {
            (each.kind, each.start, each.end, each.opened.line, each.closed and each.closed.line)
            for each in result.findings
        }
        for result in (text, binary)
    ]
    assert shapes[0] == shapes[1]
    assert text.by_event == binary.by_event
    assert text.targets == binary.targets
    assert text.limits == binary.limits
    assert binary.ended is not None
    assert text.ended is not None
    assert abs((text.ended - text.began) - (binary.ended - binary.began)) < 100_000_000  # type: ignore[operator]


def test_virtio_mem_gives_back_before_it_unmaps() -> None:
    """
    QEMU's order for virtio-mem: the memory goes first, then the mapping, both before the guest has
    its answer.
    """
    result = _check("qemu-iommufd.trace.gz")
    lines = qemu_lines("qemu-iommufd.trace.gz")
    for finding in result.findings:
        assert finding.note == "given back to the host before it was unmapped"
        assert finding.closed is not None
        assert "ram_block_discard_range" in lines[finding.opened.line - 1]
        assert "iommufd_backend_unmap_dma" in lines[finding.closed.line - 1]


def test_the_probe_names_the_64_stale_windows_of_qemu() -> None:
    """
    QEMU unmaps 128 MiB in one call, of which a server with libvfio-user's rule lets nothing go
    (LAB.md).
    """
    result = _check("probe-qemu-exact.jsonl.gz")
    stale = [finding for finding in result.findings if finding.kind is FindingKind.STALE]
    assert len(stale) == 64
    assert {finding.size for finding in stale} == {2 << 20}
    assert min(finding.start for finding in stale) == 0x108000000
    assert max(finding.end for finding in stale) == 0x110000000
    events = [json.loads(line) for line in recording("probe-qemu-exact.jsonl.gz").splitlines()]
    for finding in stale:
        assert events[finding.opened.line - 1]["event"] == "stale"
        assert finding.mapped is not None
        mapped = events[finding.mapped.line - 1]
        assert (mapped["event"], mapped["iova"], mapped["size"]) == (
            "map",
            finding.start,
            finding.size,
        )


def test_qemu_alone_cannot_prove_them_and_says_so() -> None:
    result = _check("qemu-exact.trace.gz")
    # What failed looks as if it had worked, so that QEMU's second try is one of nothing.
    assert set(result.counts) == {FindingKind.UNMAP_OF_NOTHING}
    assert "did not name one mapping exactly and covered" in _limits(result)
    assert "stale mappings cannot be ruled out (--unmap exact shows them" in _limits(result)


def test_qemu_alone_names_them_when_told_how_the_server_unmaps() -> None:
    alone = _check("qemu-exact.trace.gz", CheckOptions(unmap="exact", reader=_OPTIONS.reader))
    probe = _check("probe-qemu-exact.jsonl.gz")
    assert len(_pages(alone, FindingKind.STALE)) == 64 * 512
    assert _pages(alone, FindingKind.STALE) == _pages(probe, FindingKind.STALE)


def test_stale_mappings_of_a_real_iommu() -> None:
    """
    `ramblock run --uncoordinated` on VFIO type1: its own trace and the kernel's tracepoints tell of
    the same pages and times.
    """
    ours = _check("run-uncoordinated.jsonl.gz")
    theirs = _check("ftrace-uncoordinated.txt.gz")
    stale = FindingKind.STALE
    assert set(theirs.counts) == {stale}
    # The kernel has no event for memory that is given back.
    assert set(ours.counts) == {stale, FindingKind.FREED}
    assert _pages(ours, stale) == _pages(theirs, stale)
    assert len(_pages(ours, stale)) > 10_000
    # Every page was mapped while it was private; the kernel stamps it, and the run notes it when
    # the call has returned.
    assert all(finding.note == "mapped while private" for finding in theirs.findings[:50])
    began, noted = _first_seen(theirs), _first_seen(ours)
    # Half a second for calls under emulation; the windows are open for seconds.
    assert all(0 <= noted[page] - began[page] < 500_000_000 for page in noted)


def _first_seen(result: AuditResult) -> dict[int, int]:
    """Return when each page became stale first."""
    found: dict[int, int] = {}
    for finding in result.findings:
        if finding.kind is FindingKind.STALE and finding.since is not None:
            for page in range(finding.start >> 12, finding.end >> 12):
                found[page] = min(finding.since, found.get(page, finding.since))
    return found


def test_the_recordings_of_one_run_can_be_merged() -> None:
    names = [
        str(DATA / f"{name}-type1.{kind}.gz")
        for name, kind in (("run", "jsonl"), ("ftrace", "txt"))
    ]
    result = check_merged(names, CheckOptions(), [0, 0])
    assert (result.failures(), result.error) == (0, None)
    assert {target.name for target in result.targets} >= {"iommu0", "iommu1"}
    assert any(target.name.startswith("iommu of process") for target in result.targets)


# Mutations of real recordings: events of the run on software IOMMUs, which tells every conversion's
# end.


def _mutated(tmp_path: Path, lines: list[bytes]) -> AuditResult:
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"".join(lines))
    return check_file(str(path))


def _bad(result: AuditResult) -> list[Finding]:
    """All but the faults, which the run provokes."""
    return [finding for finding in result.findings if finding.kind is not FindingKind.FAULT]


def _numbers(lines: list[bytes], event: bytes) -> list[int]:
    return [number for number, line in enumerate(lines) if b'"event":"' + event + b'"' in line]


@pytest.mark.parametrize("seed", range(40))
def test_an_unmap_that_is_deleted_is_found(tmp_path: Path, seed: int) -> None:
    """Its pages were to become private: they stay mapped."""
    lines = recording("run-soft.jsonl.gz").splitlines(keepends=True)
    number = random.Random(seed).choice(_numbers(lines, b"unmap"))
    event = json.loads(lines.pop(number))
    result = _mutated(tmp_path, lines)
    pages = range(event["iova"] >> 12, (event["iova"] + event["size"]) >> 12)
    assert set(pages) <= _pages(result, FindingKind.STALE) | _pages(result, FindingKind.FREED)
    assert _pages(result, FindingKind.STALE) <= set(pages)
    assert {finding.target for finding in _bad(result)} == {event["target"]}


@pytest.mark.parametrize("seed", range(40))
def test_a_map_that_is_deleted_is_found(tmp_path: Path, seed: int) -> None:
    lines = recording("run-soft.jsonl.gz").splitlines(keepends=True)
    confidential = [
        number
        for number in _numbers(lines, b"map")
        if json.loads(lines[number])[
            "writable"
        ]  # the firmware is ordinary memory, always shared and of no state
    ]
    number = random.Random(seed).choice(confidential)
    event = json.loads(lines.pop(number))
    result = _mutated(tmp_path, lines)
    pages = set(range(event["iova"] >> 12, (event["iova"] + event["size"]) >> 12))
    assert _pages(result, FindingKind.MISSING) == pages
    others = {finding.kind for finding in _bad(result)} - {FindingKind.MISSING}
    assert others <= {FindingKind.UNMAP_OF_NOTHING, FindingKind.SHORT_UNMAP}
    assert {finding.target for finding in _bad(result)} == {event["target"]}


@pytest.mark.parametrize("seed", range(40))
def test_a_map_that_is_doubled_is_found(tmp_path: Path, seed: int) -> None:
    lines = recording("run-soft.jsonl.gz").splitlines(keepends=True)
    number = random.Random(seed).choice(_numbers(lines, b"map"))
    lines.insert(number, lines[number])
    result = _mutated(tmp_path, lines)
    (double,) = _bad(result)
    assert (double.kind, double.opened.line) == (FindingKind.DOUBLE_MAP, number + 2)


@pytest.mark.parametrize("seed", range(40))
def test_an_unmap_that_comes_after_its_conversion_is_found(tmp_path: Path, seed: int) -> None:
    lines = recording("run-soft.jsonl.gz").splitlines(keepends=True)
    number = random.Random(seed).choice(_numbers(lines, b"unmap"))
    end = next(each for each in _numbers(lines, b"conversion") if each > number)
    event = json.loads(lines[number])
    late = json.loads(lines[end])["t"]
    moved = json.dumps({**event, "t": late + 5}).encode() + b"\n"
    lines.insert(end + 1, moved)
    del lines[number]
    result = _mutated(tmp_path, lines)
    pages = set(range(event["iova"] >> 12, (event["iova"] + event["size"]) >> 12))
    bad = _pages(result, FindingKind.STALE) | _pages(result, FindingKind.FREED)
    assert bad == pages
    for finding in _bad(result):
        assert finding.target == event["target"]


def test_recordings_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2 << 20
    assert all(gzip.decompress(path.read_bytes()) for path in DATA.glob("*.gz"))
