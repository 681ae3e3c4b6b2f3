"""Audits of one file, of several at once, on a cluster, and merged."""

import gzip
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from ramblock.check import CheckOptions, check_file, check_files, check_merged
from ramblock.check.cluster import check_on_cluster
from ramblock.check.readers import ReaderOptions
from ramblock.check.verdict import judge
from ramblock.errors import RamblockError, UsageError
from ramblock.trace.result import AuditResult
from trace_samples import BLOCK, DATA, recording

_OPTIONS = CheckOptions(reader=ReaderOptions(virtio_mem_block_size=BLOCK))
_FILES = [str(path) for path in sorted(DATA.glob("*.gz"))]
_RUNS = [path for path in _FILES if "/run-" in path]


def _plain(results: list[AuditResult]) -> list[object]:
    return [msgspec.to_builtins(result, str_keys=True) for result in results]


def test_processes_find_what_one_finds() -> None:
    alone = [check_file(path, _OPTIONS) for path in _FILES]
    assert sum(result.failures() for result in alone) > 100
    assert _plain(list(check_files(_FILES, _OPTIONS, 1))) == _plain(alone)
    assert _plain(list(check_files(_FILES, _OPTIONS, 3))) == _plain(alone)


@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_a_cluster_finds_what_one_process_finds() -> None:
    from distributed import LocalCluster

    alone = [check_file(path, _OPTIONS) for path in _FILES]
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None
    ) as cluster:
        found = list(check_on_cluster(_FILES, _OPTIONS, cluster.scheduler_address))
    assert _plain(found) == _plain(alone)


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramblock.check.cluster._CONNECT_SECONDS", 0.5)
    with pytest.raises(RamblockError, match=r"the scheduler at tcp://127.0.0.1:1 does not answer"):
        list(check_on_cluster(_FILES[:1], _OPTIONS, "tcp://127.0.0.1:1"))


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError) as caught:
        list(check_on_cluster(_FILES[:1], _OPTIONS, "tcp://127.0.0.1:1"))
    assert "ramblock[dask]" in str(caught.value.expected)


def test_a_file_that_is_cut_is_audited_as_far_as_it_goes(tmp_path: Path) -> None:
    data = recording("run-soft-uncoordinated.jsonl.gz")
    whole = tmp_path / "whole"
    whole.write_bytes(data)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(data)[:-2000])
    result = check_file(str(cut))
    assert result.error is not None
    assert result.error.startswith(f"{cut}: the file ends in the middle")
    assert 0 < result.events < check_file(str(whole)).events
    assert result.failures() > 0


def _split(tmp_path: Path, shift: int) -> list[str]:
    """
    Write a recording as two files, whose clocks differ by *shift*: what targets did, and all else.
    """
    lines = recording("run-soft.jsonl.gz").splitlines(keepends=True)
    files = [tmp_path / "maps.jsonl", tmp_path / "rest.jsonl"]
    parts: list[list[bytes]] = [[], []]
    for line in lines:
        event = msgspec.json.decode(line)
        mapping = event["event"] in ("map", "unmap", "detach")
        if mapping:
            event["t"] += shift
        parts[not mapping].append(msgspec.json.encode(event) + b"\n")
    for path, part in zip(files, parts, strict=True):
        path.write_bytes(b"".join(part))
    return [str(path) for path in files]


@pytest.mark.parametrize("shift", [0, 7_000_000_000])
def test_merged_it_is_what_it_was(tmp_path: Path, shift: int) -> None:
    """With one clock, and with another that is off by seconds and said to be."""
    whole = check_file(str(DATA / "run-soft.jsonl.gz"))
    merged = check_merged(_split(tmp_path, shift), CheckOptions(), [-shift, 0])
    assert (merged.failures(), merged.events) == (0, whole.events)
    assert merged.counts == whole.counts
    assert merged.by_event == whole.by_event


def test_merged_with_the_wrong_offset_it_is_not_clean(tmp_path: Path) -> None:
    merged = check_merged(_split(tmp_path, 7_000_000_000), CheckOptions(), [0, 0])
    assert merged.failures() > 100


def test_what_has_no_times_cannot_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "qemu.txt"
    path.write_text("iommufd_backend_alloc_ioas  iommufd=1 ioas=2\n")
    with pytest.raises(UsageError, match=r"qemu.txt:1 has no time, so it cannot be merged"):
        check_merged([str(path), _FILES[0]], CheckOptions(), [0, 0])


def test_a_file_that_is_not_there_is_a_result(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for jobs in (1, 2):
        first, second, third = check_files([_RUNS[0], missing, _RUNS[1]], _OPTIONS, jobs)
        assert (second.error, second.events) == (f"{missing}: No such file or directory", 0)
        assert _plain([first, third]) == _plain([check_file(_RUNS[n], _OPTIONS) for n in (0, 1)])


def test_a_worker_that_dies_takes_no_other_file_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel kills one that needs too much memory."""
    deadly = str(tmp_path / "deadly")

    def check(path: str, options: CheckOptions) -> AuditResult:
        if path == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return check_file(path, options)

    monkeypatch.setattr("ramblock.check.job.check_file", check)
    paths = [_RUNS[0], deadly, *_RUNS[1:4]]
    results = list(check_files(paths, _OPTIONS, 2))
    assert [result.sources for result in results] == [[path] for path in paths]
    assert results[1].error == f"{deadly}: the process that audited it was killed"
    assert [result.error for result in results[:1] + results[2:]] == [None] * 4


def test_a_fault_of_ours_takes_no_other_file_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(path: str, options: CheckOptions) -> AuditResult:
        if path == _RUNS[1]:
            raise ZeroDivisionError("ours")
        return check_file(path, options)

    monkeypatch.setattr("ramblock.check.job.check_file", check)
    results = list(check_files(_RUNS[:3], _OPTIONS, 1))
    assert results[1].error == f"{_RUNS[1]}: its audit failed: ZeroDivisionError('ours')"
    assert results[2].error is None


_READABLE = (
    "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x4 gpa=0x0 size=0x80000000 ua=0x7f2000000000"
    " guest_memfd=14 guest_memfd_offset=0x0 ret=0\n"
    "ram_block_attributes_state_change offset 0x100000 size 0x1000"
    " from 'discarded' to 'populated'\n"
    "iommufd_backend_map_dma  iommufd=20 ioas=2 iova=0x100000 size=0x1000 addr=0x7f2000100000"
    " readonly=0 (0)\n"
)


@pytest.mark.parametrize(
    "line",
    [
        "ram_block_attributes_state_change offset 0x100000 size 0x1000 from 'populated' to 'gone'",
        "ram_block_attributes_state_change offset 0x0 size 0x10000000000000000 from 'x' to 'y'",
        "kvm_convert_memory start 0x100000 size 0x1000 shared_to_nobody",
        "iommufd_backend_unmap_dma  iommufd=20 ioas=2 iova=0x100000 size=many (0)",
        "kvm_set_user_memory AddrSpace#0 Slot#1 somewhere",
        "vfio_user_dma_map  iova 0xffffffffffffffff size 0x2000 off 0x0 flags 0x3 async_ops 1",
    ],
)
def test_a_known_event_that_cannot_be_read_is_never_clean(tmp_path: Path, line: str) -> None:
    """What it told is not in the audit, whichever event it is; the line is named."""
    path = tmp_path / "qemu.log"
    path.write_text(_READABLE)
    assert judge(check_file(str(path))).exit_code == 0
    path.write_text(f"{_READABLE}{line}\n")
    result = check_file(str(path))
    assert judge(result).exit_code == 4
    assert f"{path}:4 is a known event that cannot be read" in result.cannot_tell[0]
    path.write_text(_READABLE + f"{line}\n" * 9)
    assert "and 4 more such lines" in check_file(str(path)).cannot_tell[-1]
