"""``ramblock check``, as people call it."""

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ramblock.cli import main
from ramblock.cli.check_how import BPFTRACE, HOW
from trace_samples import DATA, recording

_CLEAN = str(DATA / "run-soft.jsonl.gz")
_BAD = str(DATA / "run-soft-uncoordinated.jsonl.gz")


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["check", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_clean(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, _CLEAN)
    assert (code, err) == (0, "")
    assert re.search(r"\nNothing found.* over 0\.1 s\.\n$", out)
    assert "400 conversions" in out


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, _BAD)
    assert (code, err) == (1, "")
    assert "stale" in out
    assert re.search(r"\n[\d,]+ findings\n$", out)


def test_worst_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _run(capsys, "--json", str(DATA / "probe-qemu-exact.jsonl.gz"))
    (audit,) = json.loads(out)["audits"]
    kinds = [finding["kind"] for finding in audit["findings"]]
    assert kinds == ["stale"] * 64 + ["broken rule"] * 6


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "--json", _BAD, _CLEAN)
    data = json.loads(out)
    assert (code, data["exit_code"]) == (1, 1)
    bad, clean = data["audits"]
    assert (bad["sources"], clean["sources"]) == ([_BAD], [_CLEAN])
    assert data["failures"] == sum(count["count"] for count in bad["counts"].values())
    assert {finding["kind"] for finding in clean["findings"]} == {"fault"}
    finding = bad["findings"][0]
    assert finding["opened"]["name"] == _BAD
    assert finding["end"] > finding["start"] >= 0


def test_a_file_that_is_not_read_to_its_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The part that was read is clean, which says nothing of the rest."""
    path = tmp_path / "cut.jsonl"
    path.write_bytes(recording("run-soft.jsonl.gz")[:-10])
    code, out, _ = _run(capsys, str(path))
    assert code == 3
    assert re.search(r"cut\.jsonl:\d+: the last line is cut\n", out)
    assert out.endswith("\nNot read to its end; nothing found in what was read\n")


def test_one_of_several_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "elf"
    path.write_bytes(b"\x7fELF" + bytes(100))
    code, out, _ = _run(capsys, "--jobs", "1", _CLEAN, str(path))
    assert code == 3
    assert "2 recordings: 1 not read to the end, 1 clean" in out
    assert "this is a program or a core dump, not a trace" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check"),
        ([_CLEAN, _CLEAN], "a file is given twice"),
        ([_CLEAN, "--offset", f"{_CLEAN}=1"], "--offset without --merge"),
        ([_CLEAN, _BAD, "--merge", "--offset", "other=1"], "--offset other=1"),
        ([_CLEAN, _BAD, "--merge", "--offset", f"{_BAD}=soon"], "--offset soon"),
        ([_CLEAN, _BAD, "--report", "x.html"], "--report and --perfetto with 2 files"),
        ([_CLEAN, "--jobs", "0"], "--jobs 0"),
        ([_CLEAN, "--grace", "ten"], "--grace ten"),
        ([_CLEAN, "--layout", "ram"], "--layout ram"),
        ([_CLEAN, "--layout", "ram=0+0"], "it is empty"),
        (["-", "--scheduler", "tcp://x:1"], "--scheduler spreads files"),
        ([_CLEAN, "--report", "/nowhere/x.html"], "--report /nowhere/x.html"),
        ([_CLEAN, "--perfetto", "/nowhere/x.json"], "--perfetto /nowhere/x.json"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert message in err


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "/nowhere/x.jsonl")
    assert code == 3
    assert "/nowhere/x.jsonl: No such file or directory" in err


def test_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(Path(_BAD).read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, _ = _run(capsys, "-", "--json")
    assert code == 1
    assert json.loads(out)["audits"][0]["findings"][0]["opened"]["name"] == "<stdin>"


def test_layout_places_what_the_trace_does_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """QEMU's state changes are relative to a block: where it lies is told by the option."""
    path = tmp_path / "qemu.txt"
    path.write_text(
        "1@1.000000:ram_block_attributes_state_change offset 0x1000 size 0x1000 from 'discarded' to"
        " 'populated'\n"
        "1@1.000001:iommufd_backend_map_dma  iommufd=1 ioas=2 iova=0x80001000 size=0x1000"
        " addr=0x1000 readonly=0 (0)\n"
        "1@2.000000:ram_block_attributes_state_change offset 0x1000 size 0x1000 from 'populated' to"
        " 'discarded'\n"
        "1@3.000000:iommufd_backend_unmap_dma  iommufd=1 ioas=2 iova=0x80001000 size=0x1000 (0)\n"
    )
    code, out, _ = _run(capsys, str(path))
    assert code == 4
    assert "--layout" in out
    assert _run(capsys, str(path), "--allow-empty")[0] == 0
    code, out, _ = _run(capsys, str(path), "--layout", "ram=0x80000000+1G", "--json")
    assert code == 1
    (finding,) = json.loads(out)["audits"][0]["findings"]
    assert (finding["kind"], finding["start"], finding["end"]) == ("stale", 0x80001000, 0x80002000)
    assert finding["until"] - finding["since"] == 10**9


@pytest.mark.parametrize(("grace", "expected"), [("2s", 0), ("1ms", 1)])
def test_grace_and_strict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, grace: str, expected: int
) -> None:
    """The order of QEMU: the attribute, then (here a second later) the unmap."""
    path = tmp_path / "qemu.txt"
    path.write_text(
        "1@1.000000:kvm_convert_memory start 0x0 size 0x1000 private_to_shared\n"
        "1@1.000001:iommufd_backend_map_dma  iommufd=1 ioas=2 iova=0x0 size=0x1000 addr=0x1000"
        " readonly=0 (0)\n"
        "1@5.000000:kvm_convert_memory start 0x0 size 0x1000 shared_to_private\n"
        "1@6.000000:iommufd_backend_unmap_dma  iommufd=1 ioas=2 iova=0x0 size=0x1000 (0)\n"
    )
    code, out, _ = _run(capsys, str(path), "--grace", grace)
    assert code == expected
    assert "1.0 s" in out
    assert _run(capsys, str(path), "--grace", grace, "--strict")[0] == 1


@pytest.mark.parametrize("what", HOW)
def test_how(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, _ = _run(capsys, "--how", what)
    assert code == 0
    assert "ramblock check" in out
    for name in ("bash", "sh"):
        shell = subprocess.run([name, "-n"], input=out, text=True, capture_output=True, check=False)
        assert (shell.returncode, shell.stderr) == (0, "")


def test_bpftrace_script_has_balanced_braces() -> None:
    assert BPFTRACE.count("{") == BPFTRACE.count("}")


def test_merge_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(DATA / "run-iommufd.jsonl.gz"), str(DATA / "ftrace-iommufd.txt.gz")]
    code, out, _ = _run(capsys, "--merge", *files)
    assert code == 0
    assert "iommu of process" in out
    assert _run(capsys, "--merge", *files, "--offset", f"{files[1]}=-2.5")[0] == 1


def test_zst(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "x.zst"
    path.write_bytes(zstandard.compress(gzip.decompress(Path(_CLEAN).read_bytes())))
    assert _run(capsys, str(path))[0] == 0
