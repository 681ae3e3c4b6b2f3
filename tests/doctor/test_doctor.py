"""
`ramblock doctor`: on this machine, as an ordinary user too, and on hosts that are made of files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from doctor_checks import check_lines
from ramblock.cli import main
from ramblock.doctor import Line, Purpose, Status, examine, fitness
from ramblock.doctor.memory import cgroup_limit
from require import require_root

# Runs once as root, so that everything is imported: nobody may perhaps not read this Python.
_AS_NOBODY = """
import contextlib, io, os, sys
from ramblock.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["doctor", "--json"])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(["doctor", "--json"]))
"""


def _by_name(text: str) -> dict[str, dict[str, str]]:
    return {line["name"]: line for line in json.loads(text)["lines"]}


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    check_lines(_by_name(capsys.readouterr().out))


@require_root
def test_as_an_ordinary_user() -> None:
    """It works, and what it cannot see it calls unseen: never lacking."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nonexistent"}
    environment.pop("XDG_CACHE_HOME", None)
    run = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = _by_name(run.stdout)
    if Path("/dev/kvm").exists() and Path("/dev/kvm").stat().st_mode & 0o006 != 0o006:
        assert lines["KVM"]["status"] == "unseen"
        assert "join the group" in lines["KVM"]["todo"]
    assert lines["RLIMIT_MEMLOCK"]["found"] != "no limit for this process (CAP_IPC_LOCK)"
    assert lines["kernel"]["found"].startswith("Linux ")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "RLIMIT_MEMLOCK" in out
    assert "dma_entry_limit" in out


@pytest.mark.parametrize("purpose", list(Purpose))
def test_exit_code_says_whether_something_is_in_the_way(
    capsys: pytest.CaptureFixture[str], purpose: Purpose
) -> None:
    code = main(["doctor", "--for", purpose, "--json"])
    result = json.loads(capsys.readouterr().out)
    needed = [line for line in result["lines"] if purpose in line["needed_for"]]
    assert needed
    bad = [line["name"] for line in needed if line["status"] in ("lacking", "unseen")]
    assert result["in_the_way"] == bad
    assert (code, result["ready"]) == (1 if bad else 0, not bad)


def _host(root: Path, files: dict[str, str]) -> dict[str, Line]:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {line.name: line for line in examine(root)}


def test_a_host_with_nothing(tmp_path: Path) -> None:
    lines = _host(tmp_path, {})
    assert lines["KVM"].status is Status.LACKING
    assert lines["IOMMU"].found == "no IOMMU groups"
    assert lines["iommufd"].found == "there is no /dev/iommu"
    assert lines["kernel configuration"].status is Status.UNSEEN
    assert lines["dma_entry_limit"].found.startswith("not known")
    assert all(line.todo for line in lines.values() if line.status is Status.LACKING)
    assert {line.name for line in fitness(list(lines.values()), Purpose.IOMMUFD)} >= {
        "IOMMU",
        "vfio-pci",
        "iommufd",
    }


def test_limits_are_told_in_memory(tmp_path: Path) -> None:
    lines = _host(
        tmp_path,
        {
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "65535\n",
            "sys/module/vhost/parameters/max_iotlb_entries": "2048\n",
            "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "N\n",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "16",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "9",
            "sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages": "1",
        },
    )
    assert lines["dma_entry_limit"].found == "65,535, which is 256.0 MiB in pages of 4 KiB"
    assert lines["vhost max_iotlb_entries"].found == "2,048, which is 8 MiB in pages of 4 KiB"
    assert lines["unsafe interrupts"].found == "vfio_iommu_type1: N"
    assert lines["huge pages for memfd"].found == "advise"
    assert "has 16, 9 free, 1 of them promised" in lines["huge pages of 2 MiB"].found


def test_a_group_of_several_devices(tmp_path: Path) -> None:
    """Bridges do not count: they stay with the host."""
    devices = {7: ("0000:01:00.0", "0000:01:00.1"), 8: ("0000:02:00.0",)}
    for number, members in devices.items():
        for member in members:
            folder = tmp_path / f"sys/kernel/iommu_groups/{number}/devices/{member}"
            folder.mkdir(parents=True)
            (folder / "driver").symlink_to("../nvidia" if member.endswith("0.0") else "../snd")
    bridge = tmp_path / "sys/kernel/iommu_groups/8/devices/0000:00:01.0"
    bridge.mkdir()
    (bridge / "driver").symlink_to("../pcieport")
    lines = _host(tmp_path, {})
    assert lines["IOMMU"].found == "2 groups of devices"
    assert (
        lines["groups of several devices"].found == "7: 0000:01:00.0 (nvidia), 0000:01:00.1 (snd)"
    )


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "8192\n",
                "sys/fs/cgroup/a/memory.max": "4096\n",
            },
            4096,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "12288",
            },
            12288,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
        ),
    ],
)
def test_limit_of_a_control_group(tmp_path: Path, files: dict[str, str], limit: Any) -> None:
    _host(tmp_path, files)
    assert cgroup_limit(tmp_path) == limit


def test_it_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path("/dev").iterdir()), Path("/proc/self/status").read_text().count("\n")
    main(["doctor"])
    capsys.readouterr()
    assert (
        sorted(Path("/dev").iterdir()),
        Path("/proc/self/status").read_text().count("\n"),
    ) == before
