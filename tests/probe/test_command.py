"""
``ramblock probe`` as people start it: exit codes, the stream of events, the trace, the summary.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ramblock import RamBlock
from ramblock.cli import main
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.errors import DmaError
from ramblock.probe import Record, Rule, Violation

P = 4096


@contextmanager
def probe(path: Path, *options: str, end: int = signal.SIGINT) -> Iterator["Running"]:
    command = [sys.executable, "-m", "ramblock", "probe", "--socket", str(path), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = Running(process)
    try:
        wait_until(lambda: path.exists() or process.poll() is not None)
        yield running
        process.send_signal(end)
        running.output, running.errors = process.communicate(timeout=60)
        running.code = process.returncode
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


class Running:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = self.errors = ""
        self.code = -1

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def use(path: Path) -> None:
    """Map two windows, unmap one, leave."""
    with RamBlock.create("ram", 4 * P) as ram:
        target = VfioUserTarget(path, timeout=60)
        for page in (0, 2):
            target.map(page * P, HostRange(ram.fd, page * P, ram.address + page * P, P))
        assert target.unmap(0, P) == P
        target.close()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_nothing_found_is_0(tmp_path: Path, end: int) -> None:
    path = tmp_path / "probe.sock"
    with probe(path, end=end) as running:
        use(path)
    assert running.code == 0, running.errors
    assert "1 client, 2 maps" in running.output
    assert "Nothing found." in running.output
    assert "listening at" in running.errors
    assert not path.exists()


def test_the_stream_and_the_trace_are_the_same_lines(tmp_path: Path) -> None:
    path, trace = tmp_path / "probe.sock", tmp_path / "trace.jsonl"
    with probe(path, "--json", "--trace", str(trace)) as running:
        use(path)
    assert running.code == 0
    events = running.events()
    names = [event["event"] for event in events]
    assert names[:2] == ["start", "connect"]
    assert names[-2:] == ["disconnect", "summary"]
    assert names.count("map") == 2
    mapped = next(event for event in events if event["event"] == "map")
    assert (mapped["target"], mapped["iova"], mapped["size"]) == ("client1", 0, P)
    assert "memfd:ram" in mapped["file"]
    assert events[-1]["counts"]["map"] == 2
    assert events[-1]["violations"] == {}
    times = [event["t"] for event in events]
    assert times == sorted(times)
    without_times = [{**event, "t": 0} for event in events]
    written = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [{**event, "t": 0} for event in written] == without_times


def test_a_broken_rule_is_1(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    with probe(path, "-q") as running, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"\xff" * 64)
        with suppress(ConnectionResetError):
            sock.recv(1)
    assert running.code == 1
    assert "1 x protocol" in running.output
    assert running.errors == ""


def test_a_trace_that_cannot_be_written_is_1_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    with probe(path, "-q", "--trace", "/dev/full") as running:
        use(path)
    assert running.code == 1
    assert "the trace is incomplete: [Errno 28]" in running.errors
    assert "1 client, 2 maps" in running.output


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--expect", "virtio-mem"), "--expect and --qmp belong together"),
        (("--qmp", "/x"), "--expect and --qmp belong together"),
        (("--trace", "/no/such/folder/x"), "--trace /no/such/folder/x: No such file"),
        (("--unmap", "sloppy"), "invalid choice"),
    ],
)
def test_usage_is_2(
    tmp_path: Path, options: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["probe", "--socket", str(tmp_path / "s"), *options])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_path_where_somebody_listens_is_2(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    with probe(path):
        done = subprocess.run(
            [sys.executable, "-m", "ramblock", "probe", "--socket", str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert "somebody listens" in done.stderr


def test_ctrl_c_that_a_shell_has_switched_off_still_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with probe(path) as running:
            use(path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert running.code == 0


def test_an_expectation_without_qemu_is_1(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    with probe(path, "--expect", "virtio-mem", "--qmp", str(tmp_path / "qmp")) as running:
        use(path)
    assert running.code == 1
    assert "nothing was compared" in running.errors


def test_a_killed_client_is_no_violation(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    script = (
        "import sys, time; from ramblock.dma import VfioUserTarget;"
        "t = VfioUserTarget(sys.argv[1]); print('there', flush=True); time.sleep(600)"
    )
    with probe(path, "--json") as running:
        client = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "there\n"
        client.kill()
        client.communicate()
        use(path)
    assert running.code == 0
    assert [e["event"] for e in running.events()].count("disconnect") == 2


def test_refused_maps_stay_refused_for_our_client(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    with probe(path, "-q") as running, RamBlock.create("ram", P) as ram:
        target = VfioUserTarget(path, timeout=60)
        assert ram.fd is not None
        os.ftruncate(ram.fd, 0)
        with pytest.raises(DmaError, match="Invalid argument"):
            target.map(0, HostRange(ram.fd, 0, ram.address, P))
        target.close()
    assert running.code == 1
    assert "1 x past the end of the file" in running.output


def test_records_are_bounded() -> None:
    record = Record()
    for number in range(5000):
        record.violation(Violation("client1", Rule.OVERLAP, number * P, P, 17, "again"))
    assert record.violation_count == 5000
    assert len(record.violations) == 1000


def test_things_that_are_let_pass_are_told_and_are_no_findings(tmp_path: Path) -> None:
    """As the unmap of two windows at once, which the specification forbids."""
    path = tmp_path / "probe.sock"
    with probe(path, "-q") as running, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        for command, payload in (
            (1, bytes(4)),
            (2, struct.pack("=IIQQQ", 32, 3, 0, 0, P)),
            (2, struct.pack("=IIQQQ", 32, 3, 0, P, P)),
            (3, struct.pack("=IIQQ", 24, 0, 0, 2 * P)),
        ):
            sock.sendall(struct.pack("=HHIII", 0, command, 16 + len(payload), 0, 0) + payload)
            answer = sock.recv(4096)
            assert answer[8:16] == struct.pack("=II", 1, 0)
    assert running.code == 0
    assert "let pass 1 x unmap that is no window" in running.output
    assert "client1: unmap of [0x0, 0x2000), which are 2 windows" in running.output
    assert "Nothing found." in running.output
