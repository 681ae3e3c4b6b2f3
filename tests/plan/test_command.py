"""``ramblock plan``, as people call it."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from pseudo_terminal import on_terminal
from ramblock.cli import main
from trace_samples import DATA

_KATA = ("--memory", "16G", "--device", "gpu-cc")


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_kata_case(capsys: pytest.CaptureFixture[str]) -> None:
    shown = on_terminal("plan", *_KATA, columns=80)
    assert (shown.returncode, shown.stderr) == (0, "")
    code, out, err = _run(capsys, *_KATA)
    assert (code, err) == (0, "")
    for text in (
        "SWIOTLB pool",
        "first fails at 256 MiB of shared memory",
        "4,195,328 pages + 32,764 slots - 3 listeners = 4,228,089, limit 65,535: QEMU refuses",
        "1. [iommufd-cutting]",
        "dma_entry_limit=4259840",
        "run: impossible on type1",
        "[assumed]",
    ):
        assert text in " ".join(out.split())
        assert text in " ".join(shown.stdout.split())
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_the_way_that_is_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *_KATA, "--policy", "page", "--target", "type1")
    assert code == 1
    assert "vhost-vdpa" not in out
    assert "[iommufd-cutting]" in out, "what helps is told all the same"
    code, out, _ = _run(capsys, *_KATA, "--policy", "run", "--target", "type1")
    assert code == 1
    assert "impossible" in out
    code, out, _ = _run(capsys, *_KATA, "--target", "iommufd-cutting")
    assert code == 0
    assert "What would make it fit" not in out


def test_limits_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    limits = (
        "--dma-entry-limit",
        "5000000",
        "--max-iotlb-entries",
        "500000",
        "--server-maps",
        "5000000",
    )
    code, out, _ = _run(capsys, *_KATA, *limits)
    assert code == 0
    assert "refuse" not in out
    assert "What would make it fit" not in out
    code, out, _ = _run(
        capsys, *_KATA, *limits, "--memlock", "8M", "--cgroup", "1G", "--memslots", "512"
    )
    assert "RLIMIT_MEMLOCK = 8,388,608" in out
    assert "memory of the control group = 1,073,741,824" in out
    assert "+ 512 slots" in out


def test_limits_of_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, *_KATA, "--this-host", "--json")
    assert code == 0
    limits = json.loads(out)["limits"]
    path = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    expected = int(path.read_text()) if path.exists() else 65_535
    assert limits["dma_entry_limit"] == expected


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, *_KATA, "--json", "--vcpus", "8", "--numa", "2", "--tee", "snp",
                          "--os", "linux-swiotlb-dynamic,eager-accept", "--virtio-mem", "4G:8M",
                          "--backing", "2M", "--conversions", "7", "--rate", "3..9")  # fmt: skip
    assert (code, err) == (0, "")
    guest = json.loads(out)["guest"]
    assert guest == {
        "memory": 16 << 30,
        "vcpus": 8,
        "numa_nodes": 2,
        "devices": ["gpu-cc"],
        "os": ["linux-swiotlb-dynamic", "eager-accept"],
        "technology": "snp",
        "virtio_mem": {"size": 4 << 30, "block_size": 8 << 20},
        "backing_page": 2 << 20,
        "conversions": 7,
        "rate": {"low": 3, "expected": 6, "high": 9},
    }


def test_devices_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _run(capsys, "--memory", "1G", "--device", "nic:3", "--device", "nvme", "--json")
    assert json.loads(out)["guest"]["devices"] == ["nic", "nic", "nic", "nvme"]


def test_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--memory", "512M", "--conversions", "200", "--simulate", "high")
    code, out, _ = _run(capsys, *arguments)
    assert code == 0
    assert "Simulated: 10," in out
    first = _run(capsys, *arguments, "--json", "--seed", "7")[1]
    assert first == _run(capsys, *arguments, "--json", "--seed", "7")[1]
    assert first != _run(capsys, *arguments, "--json", "--seed", "8")[1]


def test_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "run-iommufd.jsonl.gz")
    code, out, err = _run(capsys, path)
    assert (code, err) == (0, "")
    assert "52 conversions" in out
    assert "As recorded" in out
    assert _run(capsys, path, "--target", "vhost-vdpa")[0] == 1
    data = json.loads(_run(capsys, path, "--json", "--policy", "run")[1])
    assert {row["policy"] for row in data["rows"]} == {"run"}


def test_a_sweep_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "--device", "nic", "--sweep", "memory=1G..8G", "--policy", "page")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4 * 5
    assert "4 of 4 guests" in err
    code, out, err = _run(capsys, "--sweep", "memory=1G,2G", "--json", "--target", "type1", "-q")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["complete"] is True
    assert len(data["rows"]) == 2 * 2


def test_a_sweep_to_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, plot = tmp_path / "t.csv", tmp_path / "p.html"
    code, out, _ = _run(capsys, "--sweep", "memory=1G..8G", "--table", str(table),
                        "--plot", str(plot), "--jobs", "1")  # fmt: skip
    assert (code, out) == (0, "")
    assert table.stat().st_size > 0
    assert plot.stat().st_size > 1 << 20, "with all it needs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no guest to plan for"),
        (("--memory", "64M"), "memory of 64 MiB (0x4000000), expected whole pages, 256 MiB to"),
        (("--memory", "x"), "'x' is not a size"),
        (("--memory", "1G", "--device", "gpu"), "--device gpu, expected nic, nvme, gpu-cc, none"),
        (("--memory", "1G", "--device", "nic:0"), "--device nic:0"),
        (("--memory", "1G", "--device", "nic:x"), "--device nic:x"),
        (("--memory", "1G", "--os", "bsd"), "--os bsd, expected linux-swiotlb"),
        (("--memory", "1G", "--rate", "9..3"), "9 to 3"),
        (("--memory", "1G", "--rate", "x"), "--rate x"),
        (("--memory", "1G", "--dma-entry-limit", "0"), "--dma-entry-limit 0, expected at least 1"),
        (("--memory", "1G", "--format", "qemu"), "--format without a recording"),
        (("--memory", "1G", "--table", "x.csv"), "--table without --sweep"),
        (("--memory", "1G", "--jobs", "2"), "--jobs without --sweep"),
        (("--sweep", "memory=1G", "--jobs", "0"), "--jobs 0, expected at least 1"),
        (("--sweep", "memory=1G", "--simulate"), "--simulate with --sweep"),
        (("--sweep", "memory=1G", "--sweep", "memory=2G"), "an axis is given twice"),
        (("--sweep", "tee=tdx"), "no guest to plan for"),
        (("--memory", "1G", "--sweep", "colour=red"), "--sweep colour=red, expected NAME=VALUES"),
        (
            ("--memory", "1G", "--sweep", "tee=tdx", "--plot", "x.html"),
            "--plot has nothing to go along",
        ),
        (("x.jsonl", "--memory", "1G"), "--memory with a recording"),
        (("x.jsonl", "--simulate"), "--simulate with a recording"),
        (("x.jsonl", "--memlock", "4K"), "--memlock with a recording"),
        (("x.jsonl", "--virtio-mem", "4G"), "--virtio-mem with a recording"),
        (("--memory", "0x" + "f" * 400), "is not a size"),
        (("--memory", "1G", "--device", "nic:" + "9" * 5000), "--device nic:999"),
        (("--memory", "1G", "--dma-entry-limit", "99999999999"), "at most 4,294,967,295"),
        (("--memory", "1G", "--memlock", "0x" + "f" * 40), "--memlock 1"),
    ],
)  # fmt: skip
def test_usage(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ramblock: error: ")
    assert said in err


def test_a_recording_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = _run(capsys, str(tmp_path / "none.jsonl"))
    assert code == 3
    assert "none.jsonl" in err
    other = tmp_path / "other.txt"
    other.write_text("this is no trace\n")
    code, _, err = _run(capsys, str(other))
    assert code == 3
    assert str(other) in err


def test_without_plotly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    path = tmp_path / "x.html"
    code, out, err = _run(capsys, *_KATA, "--plot", str(path))
    assert (code, out) == (2, "")
    assert "ramblock[report]" in err
    assert not path.exists()


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.html"
    code, _, err = _run(capsys, "--memory", "256M", "--conversions", "0", "--plot", str(path))
    assert code == 2
    assert str(path) in err


def test_a_sweep_in_which_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--device", "gpu-cc", "--sweep", "memory=16G,32G", "-q", "--target", "type1")
    assert _run(capsys, *arguments)[0] == 1
    assert _run(capsys, *arguments[:-2])[0] == 0


def test_what_cannot_be_is_said_of_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "run-iommufd.jsonl.gz")
    code, out, _ = _run(capsys, path, "--policy", "run", "--target", "type1")
    assert code == 1
    assert "run: impossible on type1: they cannot cut" in out


@pytest.mark.parametrize(
    "line",
    [
        "kvm_convert_memory start 0x0 size 0x1000 shared_to_private",
        "vfio_listener_region_del region_del 0x0 - 0xfff",
    ],
    ids=["private", "no conversions"],
)
def test_a_recording_without_shared_memory_is_nothing_to_plan_from(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qemu.trace"
    path.write_text(f"1@1.000000:{line}\n")
    code, out, _ = _run(capsys, str(path))
    assert code == 4
    assert out.endswith(
        "Cannot tell: no memory is shared in this recording, so there is nothing to plan from\n"
    )
    assert "fits" not in out
    code, out, _ = _run(capsys, str(path), "--json")
    assert code == 4
    assert "nothing to plan from" in json.loads(out)["cannot_tell"]


@pytest.mark.parametrize("content", ["", "plan.html", "\x7fELF"])
def test_what_is_no_recording_is_unreadable(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    assert _run(capsys, str(path))[0] == 3
