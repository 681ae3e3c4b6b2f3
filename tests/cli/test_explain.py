"""``ramblock explain``: the whole way, from a log to text, JSON and exit codes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from hostile_text import HOSTILE, bad_characters
from message_samples import SAMPLES
from ramblock.cli import main
from ramblock.explain import explain
from ramblock.trace.messages.catalogue import ENTRIES
from trace_samples import DATA

_REPORTS = DATA / "reports"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["explain", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def _names(result: dict[str, Any]) -> list[str]:
    return [message["name"] for message in result["messages"]]


@pytest.mark.parametrize(
    ("report", "names"),
    [
        ("04-notify-discard-failed.log", ["qemu-discard-unmap-failed"]),
        ("16-dmesg-mixed.txt", ["dmar-fault", "amd-vi-fault"]),
        ("26-region-added-twice.log", ["qemu-map-invalid"]),
        ("31-bar-above-iommu-width.log", ["qemu-map-invalid"]),
        ("32-kubevirt-discard-broken.log", ["container-not-set-up", "discarding-broken"]),
        ("33-rmpupdate-dmesg.txt", ["rmpupdate-failed"]),
        ("44-kata-journal-bar.log", ["iommufd-map-bar", "qemu-map-bad-address"]),
        ("45-proxmox-journal.log", ["type1-map-invalid", "qemu-map-invalid", "slot-refused"]),
    ],
)
def test_a_report(report: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, result = _json(capsys, str(_REPORTS / report))
    assert (code, _names(result)) == (0, names)


def test_json_says_where_and_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = _json(capsys, str(_REPORTS / "44-kata-journal-bar.log"))
    assert code == result["exit_code"] == 0
    assert (result["schema"], result["version"]) == ("ramblock.explain", 1)
    assert (result["lines"], result["error"]) == (4, None)
    message = result["messages"][0]
    assert message["text"] == "IOMMU_IOAS_MAP failed: Bad address, PCI BAR?"
    assert (message["first_line"], message["lines"]) == (1, 2)
    entry = next(each for each in ENTRIES if each.name == message["name"])
    assert message["reports"] == entry.addresses
    for field in ("failed", "cause", "remedy", "versions", "source"):
        assert message[field] == getattr(entry, field)


def test_text_explains_one_failure_of_several_messages_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", str(_REPORTS / "45-proxmox-journal.log")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 known messages in 3 lines:\n")
    assert text.count("reserved_regions") == 1
    assert "VFIO_MAP_DMA failed: Invalid argument (line 1)" in text
    assert "github.com/cloud-hypervisor/cloud-hypervisor/issues/8896" in text


def test_nothing_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("all is well\n" * 3)
    assert main(["explain", str(log)]) == 4
    assert capsys.readouterr().out.startswith("Nothing known in 3 lines")
    log.write_text("")
    assert _json(capsys, str(log))[0] == 4


def test_stdin_is_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(SAMPLES["swiotlb-full"].encode()))
    monkeypatch.setattr("sys.stdin", stream)
    code, result = _json(capsys)
    assert (code, _names(result)) == (0, ["swiotlb-full"])


def test_a_log_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", str(tmp_path / "none")]) == 3
    assert "No such file" in capsys.readouterr().err
    import gzip

    log = tmp_path / "log.gz"
    whole = gzip.compress(b"nothing\n" * 100)
    log.write_bytes(whole[: len(whole) - 4])
    assert main(["explain", str(log)]) == 3
    shown = capsys.readouterr()
    assert "Nothing known" in shown.out
    assert "the file ends" in shown.err
    # What was found before the end counts.
    whole = gzip.compress(SAMPLES["dmar-fault"].encode() + b"\n")
    log.write_bytes(whole[: len(whole) - 4])
    code, result = _json(capsys, str(log))
    assert (code, _names(result)) == (0, ["dmar-fault"])
    assert "the file ends" in result["error"]


def test_the_catalogue_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--list"]) == 0
    text = capsys.readouterr().out
    for entry in ENTRIES:
        assert f"\n{entry.name}\n" in f"\n{text}"
        assert entry.remedy in text
    code, result = _json(capsys, "--list")
    assert code == 0
    assert [each["name"] for each in result["catalogue"]] == [entry.name for entry in ENTRIES]


def test_nothing_of_a_stranger_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    bad = HOSTILE.replace("\n", " ").encode() + b"\xff"
    log.write_bytes(b"\n".join(bad + sample.encode() + bad for sample in SAMPLES.values()))
    for arguments in ([], ["--json"]):
        assert main(["explain", *arguments, str(log)]) == 0
        shown = capsys.readouterr()
        assert not bad_characters(shown.out + shown.err)


def test_a_line_may_have_any_length_and_come_in_any_pieces() -> None:
    """A message is found wherever in a line it stands, and one line counts once."""
    message = SAMPLES["qemu-few-mappings"].encode()
    for place in (0, 1 << 16, (1 << 16) - 40, (1 << 17) + 700, 3 << 20):
        log = b"first\n" + b"x" * place + b" " + message + b"y" * (1 << 17) + b"\nlast\n"
        for size in (1 << 12, 1 << 18, len(log)):
            found = explain(log[at : at + size] for at in range(0, len(log), size))
            assert found.lines == 3
            ((known),) = found.known
            assert (known.entry.name, known.first, known.lines) == ("qemu-few-mappings", 2, 1)
    lines = (message + b"\n") * 1000
    for size in (1, 7, 1 << 10):
        found = explain(lines[at : at + size] for at in range(0, len(lines), size))
        assert (found.lines, found.known[0].lines) == (1000, 1000)
