"""
Sweeps: what varies, the same table however it is worked out, and what is left when it is
interrupted.
"""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from ramblock.dma.target import MappingPolicy
from ramblock.errors import RamblockError, UsageError
from ramblock.plan import TARGETS, Guest, Limits, Profile, Sweep
from ramblock.plan.formula import need
from ramblock.plan.sweep import AXES, COLUMNS, parse_axis
from ramblock.plan.sweep_run import run_on_cluster, run_sweep
from ramblock.plan.table import check_table, write_table
from ramblock.units import GIB, MIB

_BASE = Guest(memory=GIB, devices=(Profile.NIC,))


def _sweep(*axes: str) -> Sweep:
    return Sweep(guest=_BASE, limits=Limits(), axes=tuple(parse_axis(text) for text in axes))


def _quiet(_: int) -> None:
    pass


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("memory=8G..64G", [8 * GIB, 16 * GIB, 32 * GIB, 64 * GIB]),
        ("memory=8G..63G", [8 * GIB, 16 * GIB, 32 * GIB]),
        ("memory=1G..2G+512M", [GIB, 1536 * MIB, 2 * GIB]),
        ("vcpus=3..3", [3]),
    ],
)
def test_ranges(text: str, values: list[int]) -> None:
    assert parse_axis(text)[1] == tuple(map(str, values))


def test_lists() -> None:
    assert parse_axis("policy=page,run") == ("policy", ("page", "run"))
    assert parse_axis("os=linux-swiotlb/lazy-accept,linux-swiotlb-dynamic")[1] == (
        "linux-swiotlb/lazy-accept",
        "linux-swiotlb-dynamic",
    )


@pytest.mark.parametrize(
    "text",
    [
        "colour=red",
        "memory",
        "memory=",
        "memory=..2G",
        "memory=2G..1G",
        "memory=0..1G",
        "memory=1G..2G+0",
        "memory=1..1T+1",
    ],
)
def test_axes_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_axis(text)
    assert caught.value.expected


@pytest.mark.parametrize(
    "text",
    [
        "memory=1M",
        "vcpus=x",
        "policy=auto",
        "target=vfio",
        "tee=sgx",
        "device=gpu",
        "os=windows",
        "virtio-mem=3M",
        "virtio-mem=9999999T",
        "dma-entry-limit=-5",
        "dma-entry-limit=0",
        "dma-entry-limit=4G",
    ],
)
def test_values_are_checked_before_the_work(text: str) -> None:
    with pytest.raises(UsageError):
        run_sweep(_sweep(text), 1, _quiet)


def test_every_axis_varies_something() -> None:
    values = {
        "memory": "2G",
        "vcpus": "64",
        "numa": "4",
        "device": "gpu-cc",
        "os": "linux-swiotlb-dynamic",
        "tee": "snp",
        "virtio-mem": "4G",
        "backing": "2M",
        "conversions": "5",
        "policy": "page",
        "target": "type1",
        "dma-entry-limit": "7",
    }
    assert set(values) == set(AXES)
    plain = _sweep().rows(0, [()])
    for name, value in values.items():
        sweep = _sweep(f"{name}={value}")
        changed = [row for point in sweep.points() for row in sweep.rows(0, [point])]
        assert changed != plain, name


def test_all_combinations_in_order() -> None:
    sweep = _sweep(
        "memory=1G,2G,4G", "policy=page,run", "target=type1,iommufd-cutting", "vcpus=1,2"
    )
    told: list[int] = []
    swept = run_sweep(sweep, 2, told.append)
    assert (len(sweep), swept.guests, sum(told), swept.complete) == (6, 6, 6, True)
    assert [row["guest"] for row in swept.rows] == [guest for guest in range(6) for _ in range(4)]
    assert {tuple(row) for row in swept.rows} == {COLUMNS}
    first = [(row["policy"], row["target"]) for row in swept.rows[:4]]
    assert set(first) == {
        (policy, target) for policy in ("page", "run") for target in ("type1", "iommufd-cutting")
    }
    assert [row["memory"] for row in swept.rows[::8]] == [GIB, 2 * GIB, 4 * GIB]


def test_rows_say_what_a_plan_says() -> None:
    (row,) = _sweep("policy=page", "target=type1").rows(0, [()])
    wanted = need(_BASE, MappingPolicy.PAGE, TARGETS[0])
    assert row["peak_entries_high"] == wanted.peak_entries.high
    assert row["boot_maps_low"] == wanted.boot_maps.low
    assert row["limit"] == 65_535
    assert row["left"] == 65_535 - wanted.peak_entries.high
    assert row["qemu_passes"] is False
    (impossible,) = _sweep("policy=run", "target=type1").rows(0, [()])
    assert (impossible["verdict"], impossible["peak_entries_high"]) == ("impossible", None)


@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_a_cluster_makes_the_same_table(tmp_path: Path) -> None:
    from distributed import LocalCluster

    sweep = _sweep("memory=1G..16G+128M", "device=nic,gpu-cc")
    alone = run_sweep(sweep, 2, _quiet)
    told: list[int] = []
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None
    ) as cluster:
        spread = run_on_cluster(sweep, cluster.scheduler_address, told.append)
    assert spread == alone
    assert sum(told) == len(sweep) == alone.guests
    files = [tmp_path / "alone.csv", tmp_path / "spread.csv"]
    for path, swept in zip(files, (alone, spread), strict=True):
        with path.open("wb") as stream:
            write_table(stream, path.suffix, swept.rows)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramblock.plan.sweep_run._CONNECT_SECONDS", 0.5)
    with pytest.raises(RamblockError, match=r"the scheduler at tcp://127.0.0.1:1 does not answer"):
        run_on_cluster(_sweep("memory=1G"), "tcp://127.0.0.1:1", _quiet)


def test_without_what_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as caught:
        run_on_cluster(_sweep("memory=1G"), "tcp://127.0.0.1:1", _quiet)
    assert "ramblock[dask]" in str(caught.value.expected)
    with pytest.raises(UsageError) as caught:
        check_table(tmp_path / "x.parquet")
    assert "ramblock[parquet]" in str(caught.value.expected)


def test_csv_and_parquet_hold_the_same(tmp_path: Path) -> None:
    swept = run_sweep(_sweep("memory=1G..4G"), 1, _quiet)
    for name in ("t.csv", "t.parquet"):
        check_table(tmp_path / name)
        with (tmp_path / name).open("wb") as stream:
            write_table(stream, Path(name).suffix, swept.rows)
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == list(COLUMNS)
    assert table.to_pylist() == swept.rows
    with (tmp_path / "t.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(swept.rows)
    for line, row in zip(lines, swept.rows, strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}


@pytest.mark.parametrize("name", ["t.txt", "t", "missing/t.csv"])
def test_tables_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        check_table(tmp_path / name)


_SLOW = """
import sys, time
from ramblock.cli import main
from ramblock.plan import sweep_run
plan = sweep_run._plan
def slowly(sweep, first, points):
    if first >= 200:
        time.sleep(1)
    return plan(sweep, first, points)
sweep_run._plan = slowly
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_keeps_what_is_there(tmp_path: Path) -> None:
    """The terminal sends it to all processes."""
    table = tmp_path / "sweep.csv"
    script = tmp_path / "slowly.py"
    script.write_text(_SLOW)
    arguments = ["plan", "--sweep", "memory=1G..100G+64M", "--jobs", "2", "--table", str(table)]
    child = subprocess.Popen(
        [sys.executable, "-u", script, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        child.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "interrupted: the table has what was done" in err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    guests = {int(row["guest"]) for row in rows}
    assert set(range(200)) <= guests
    assert len(guests) < 1585
    assert f"{len(guests):,} of 1,585 guests" in err


def test_too_many_combinations_are_refused_at_once() -> None:
    axes = [f"{name}=1..900000+1" for name in ("conversions", "dma-entry-limit")]
    with pytest.raises(UsageError, match="combinations"):
        _sweep(*axes).check()


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        check_table(tmp_path / "d.csv")


def test_limits_of_mappings_are_in_their_column_alone() -> None:
    sweep = Sweep(guest=_BASE, limits=Limits(memlock=GIB), axes=(parse_axis("policy=page"),))
    limits = {row["target"]: row["limit"] for row in sweep.rows(0, [()])}
    assert limits == {
        "type1": 65_535,
        "iommufd": None,
        "iommufd-cutting": None,
        "vfio-user": 65_535,
        "vhost-vdpa": 2_048,
    }
