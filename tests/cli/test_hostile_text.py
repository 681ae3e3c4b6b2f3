"""
No command lets a stranger's control characters through, in any of its outputs.

The class is held, not a list of callers: hostile text comes in by every name that a command knows,
and each sink is read.
"""

import ast
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ramblock.cli
from hostile_text import HOSTILE, HOSTILE_NAME, bad_characters
from pseudo_terminal import Screen
from ramblock.cli import main
from ramblock.cli.probe_summary import print_summary
from ramblock.cli.probe_view import LiveView, PlainView
from ramblock.cli.progress import Progress
from ramblock.cli.terminal import Styled, Terminal, out
from ramblock.doctor import Line, Status
from ramblock.probe import Record, Rule, Violation
from ramblock.trace.writer import TraceWriter
from trace_samples import DATA, recording

_HOSTILE_BYTES = HOSTILE.encode().replace(b"\n", b" ") + b"\xff"


def _own_trace() -> bytes:
    """Return a trace whose every name is hostile."""
    block = {"name": HOSTILE, "gpa": 0, "size": 1 << 20, "confidential": True}
    lines: list[dict[str, object]] = [
        {"t": 1, "event": "start", "version": 1, "blocks": [block], "targets": {HOSTILE: HOSTILE}},
        {"t": 2, "event": "map", "target": HOSTILE, "iova": 0, "size": 4096, "writable": True},
        {"t": 3, "event": "attributes", "gpa": 0, "size": 4096, "private": True},
        {
            "t": 4,
            "event": "violation",
            "target": HOSTILE,
            "rule": HOSTILE,
            "reason": HOSTILE,
            "iova": 0,
            "size": 4096,
        },
        {"t": 90_000_000, "event": HOSTILE},
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _qemu_trace() -> bytes:
    return (
        b"1@1.000000:kvm_convert_memory start 0x0 size 0x1000 private_to_shared\n"
        + _HOSTILE_BYTES
        + b"\n1@1.000001:iommufd_backend_map_dma  iommufd=1 ioas=2 iova=0x0 size=0x1000 addr=0x1"
        + _HOSTILE_BYTES
        + b" readonly=0 (0)\n1@2.0:kvm_convert_memory start 0x0 size 0x1000 "
        + _HOSTILE_BYTES
        + b"\n"
    )


def _ftrace() -> bytes:
    """Return a recording of the kernel's whose processes have hostile names."""
    return recording("ftrace-uncoordinated.txt.gz").replace(b"KVM", b"K\x1b[2J\xe2\x80\xae")


_TRACES: dict[str, Callable[[], bytes]] = {
    "own": _own_trace,
    "QEMU": _qemu_trace,
    "ftrace": _ftrace,
    "nothing": lambda: _HOSTILE_BYTES * 3,
    "empty": bytes,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / HOSTILE_NAME
    path.mkdir()
    return path


def _assert_clean(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert not bad_characters(shown.out), shown.out
    assert not bad_characters(shown.err), shown.err
    return shown.out + shown.err


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings(each)


@pytest.mark.parametrize("name", _TRACES)
@pytest.mark.parametrize("strict", [(), ("--strict",)])
def test_check(
    name: str, strict: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = folder / "trace"
    trace.write_bytes(_TRACES[name]())
    page, perfetto = folder / "page.html", folder / "perfetto.json"
    files = ["--report", str(page), "--perfetto", str(perfetto)]
    code = main(["check", str(trace), *strict, *files])
    _assert_clean(capsys)
    assert main(["check", "--json", str(trace), *strict]) == code
    assert json.loads(_assert_clean(capsys).partition("ramblock: error")[0])["exit_code"] == code
    assert main(["check", str(trace), str(DATA / "run-soft.jsonl.gz"), "--jobs", "1"]) in (0, code)
    _assert_clean(capsys)
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert not bad_characters(data)
    assert all(each.isprintable() for each in _strings(json.loads(data)))
    title = re.findall(r"<title>(.*?)</title>", text, re.DOTALL)[0]
    assert not bad_characters(title)
    assert all(each.isprintable() for each in _strings(json.loads(perfetto.read_bytes())))


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", HOSTILE_NAME],
        ["check", "--json", HOSTILE_NAME],
        ["check", HOSTILE_NAME, "other", "--jobs", "1"],
        ["check", "x", "--offset", HOSTILE_NAME, "--merge"],
        ["check", "x", "--layout", HOSTILE_NAME],
        ["check", "x", "--grace", HOSTILE_NAME],
        ["check", "x", "--virtio-mem-block", HOSTILE_NAME],
        ["check", "x", "--scheduler", HOSTILE_NAME],
        ["check", "x", "--report", f"/{HOSTILE_NAME}/x"],
        ["check", "x", "--format", HOSTILE_NAME],
        ["check", f"--{HOSTILE_NAME}"],
        [HOSTILE_NAME],
        ["--log-level", HOSTILE_NAME],
        ["run", HOSTILE_NAME],
        ["run", "--workload", HOSTILE_NAME],
        ["run", "--inject", HOSTILE_NAME],
        ["run", "--memory", HOSTILE_NAME],
        ["run", "--iommu", HOSTILE_NAME],
        ["run", "--iommu", f"vfio-user:/{HOSTILE_NAME}"],
        ["run", "--iommu", "type1", "--device", HOSTILE_NAME],
        ["run", "--trace", f"/{HOSTILE_NAME}/x"],
        ["plan", HOSTILE_NAME],
        ["plan", "--memory", HOSTILE_NAME],
        ["plan", "--memory", "1G", "--device", HOSTILE_NAME],
        ["plan", "--memory", "1G", "--os", HOSTILE_NAME],
        ["plan", "--memory", "1G", "--rate", HOSTILE_NAME],
        ["plan", "--memory", "1G", "--plot", f"/{HOSTILE_NAME}/x"],
        ["plan", "--sweep", HOSTILE_NAME],
        ["plan", "--sweep", f"device={HOSTILE_NAME}", "--memory", "1G"],
        ["plan", "--sweep", "memory=1G", "--table", HOSTILE_NAME],
        ["probe", "--socket", f"/{HOSTILE_NAME}/x"],
        ["probe", "--socket", "x", "--trace", f"/{HOSTILE_NAME}/x"],
        ["doctor", "--for", HOSTILE_NAME],
        ["explain", HOSTILE_NAME],
        ["explain", HOSTILE_NAME, HOSTILE_NAME],
    ],
    ids=lambda arguments: " ".join(arguments).replace(HOSTILE_NAME, "HOSTILE"),
)
def test_errors(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code not in (0, 1, None)
    assert "error" in _assert_clean(capsys)


def test_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = folder / "s.toml"
    scenario.write_text('[guest]\nmemory = "256M"\nkind = "script"\n[run]\nconversions = 20\n')
    trace, page = folder / "trace", folder / "page.html"
    files = ["--trace", str(trace), "--report", str(page)]
    assert main(["run", "-q", str(scenario), *files]) == 0
    _assert_clean(capsys)
    assert main(["run", "-q", "--json", "--workload", str(trace), "--guest", "script"]) == 0
    assert json.loads(_assert_clean(capsys))["schema"] == "ramblock.run"
    assert main(["check", str(trace)]) == 0
    assert not bad_characters(trace.read_text())
    assert main(["plan", str(trace), "--plot", str(page)]) == 0
    _assert_clean(capsys)
    assert main(["plan", "--json", str(trace)]) == 0
    assert json.loads(_assert_clean(capsys))["schema"] == "ramblock.plan-trace"
    scenario.write_text(f"{HOSTILE!r} = 1\n")
    assert main(["run", "-q", str(scenario)]) != 0
    _assert_clean(capsys)


def test_a_recording_that_plan_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = folder / "trace"
    trace.write_bytes(_own_trace())
    main(["plan", str(trace)])
    _assert_clean(capsys)


def _record() -> Record:
    stream = io.BytesIO()
    record = Record(TraceWriter(None, stream=stream))
    record.violations.append(Violation(HOSTILE, Rule.EMPTY, 0, 0, None, HOSTILE_NAME))
    record.broken[Rule.EMPTY] = 1
    record.emit("violation", client=HOSTILE, text=HOSTILE_NAME)
    assert not bad_characters(stream.getvalue().decode())
    return record


def test_probe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _record()
    print_summary(record)
    assert "rule" in _assert_clean(capsys) or record.broken
    probe: Any = SimpleNamespace(path=folder, record=record, client=HOSTILE, windows=[])
    view = PlainView(probe)
    view.update()
    _assert_clean(capsys)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    device = SimpleNamespace(name=HOSTILE, plugged=0, mapped=4096, agrees=False)
    expectation: Any = SimpleNamespace(devices={"x": device})
    with LiveView(probe, expectation) as live:
        live.update()
    assert not bad_characters(screen.picture)
    assert "plugged" in screen.picture


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(name=HOSTILE, status=Status.LACKING, found=HOSTILE, why=HOSTILE, todo=HOSTILE)
    monkeypatch.setattr("ramblock.cli.doctor_command.examine", lambda: [line])
    monkeypatch.setattr("ramblock.cli.doctor_command.fitness", lambda *_: [line])
    for options in ([], ["--for", "kvm"], ["--json"]):
        main(["doctor", *options])
        _assert_clean(capsys)


def test_messages_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from ramblock.cli.main import _Formatter

    record = logging.makeLogRecord({"msg": "%s", "args": (HOSTILE,), "name": HOSTILE})
    assert not bad_characters(_Formatter("%(name)s: %(message)s").format(record))


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("ramblock.cli.progress._EVERY_SECONDS", -1)
    with Progress(quiet=False) as progress:
        progress.show(lambda _: HOSTILE, 1, 2)
    assert "\\x1b" in screen.picture
    assert not bad_characters(screen.picture)


def test_the_terminal_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    terminal = Terminal(screen)
    terminal.line(HOSTILE, Styled(HOSTILE, "bold"))
    terminal.verbatim(HOSTILE)
    terminal.table([[HOSTILE, [HOSTILE, (HOSTILE, Styled(HOSTILE, "red"))]]], header=[HOSTILE, ""])
    terminal.draw([HOSTILE])
    terminal.draw_progress(HOSTILE, 1, 2)
    terminal.clear()
    terminal.json("x", 1, {HOSTILE: HOSTILE_NAME})
    assert not bad_characters(screen.picture)


def test_nobody_else_prints() -> None:
    """One module writes to the streams; else a new command would have its own sink."""
    folder = Path(ramblock.cli.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "print", f"{path.name}:{node.lineno}"
                assert not re.fullmatch(r"sys\.std(out|err)(\.buffer)?\.write(lines)?", called)
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "rich" not in ast.unparse(node), f"{path.name}:{node.lineno}"


def test_a_stream_that_knows_no_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    out().line("5 µs")
    out()._stream.flush()
    assert raw.getvalue() == b"5 \\xb5s\n"


@pytest.mark.parametrize("command", ["check --how qemu", "--help", "doctor", "explain --list"])
def test_a_closed_pipe_ends_silently(command: str) -> None:
    import subprocess
    import sys

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ramblock", *command.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
