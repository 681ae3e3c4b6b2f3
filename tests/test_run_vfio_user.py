"""
``ramblock run`` on devices of other processes: a probe, one that is killed, a server that nobody
drives.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ramblock.cli import main
from ramblock.probe import Probe
from vfio_user_server import Server


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["run", "-q", "--json", "--guest", "script", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_on_a_probe_is_clean_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Probe(tmp_path / "probe.sock", touch=True) as probe:
        code, report = run(
            capsys, "--iommu", f"vfio-user:{probe.path}", "--memory", "64M", "--conversions", "150"
        )
        probe.wait_for(lambda: probe.client is None)

    assert (code, report["violations"]["count"]) == (0, 0)
    assert probe.record.clean, probe.record.violations
    # Both counted the same calls; the probe sees those of the end, when everything is unmapped, as
    # well.
    assert probe.record.counts["map"] >= report["mappings"]["map_calls"] > 100
    assert probe.record.counts["map"] == probe.record.counts["unmap"]
    assert report["targets"]["iommu0"] == f"vfio-user server at {probe.path}, a ramblock probe"
    # The device really did DMA, through the socket, and faulted where it should.
    dma = report["devices"]
    assert dma["accesses"] > 0
    assert dma["faults_own"] == 0
    assert dma["forbidden_faulted"] == dma["forbidden"] > 0


def test_a_server_that_is_killed_poisons(tmp_path: Path) -> None:
    path = tmp_path / "probe.sock"
    server = subprocess.Popen([sys.executable, "-m", "ramblock", "probe", "-q", "--socket", path])
    job = None
    try:
        wait_until(path.exists)
        trace = tmp_path / "trace.jsonl"
        job = subprocess.Popen(
            [
                *(sys.executable, "-m", "ramblock", "run", "-q", "--json", "--guest", "script"),
                *("--iommu", f"vfio-user:{path}", "--memory", "64M"),
                *("--conversions", "1000000", "--trace", trace),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: trace.exists() and trace.stat().st_size > 0)
        server.send_signal(signal.SIGKILL)
        server.wait()
        output, errors = job.communicate(timeout=120)
    finally:
        for process in (server, job):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    assert job.returncode == 1, errors
    assert f"vfio-user server at {path} is lost" in errors
    report = json.loads(output)
    assert report["poisoned"]
    assert report["violations"]["count"] == 0
    assert report["in_doubt"]


def test_to_a_server_that_nobody_drives_memory_is_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.sock"
    with served(path) as servers:
        code, report = run(
            capsys, "--iommu", f"vfio-user:{path}", "--memory", "64M", "--conversions", "100"
        )
    assert (code, report["violations"]["count"]) == (0, 0)
    assert report["targets"]["iommu0"].endswith("which nobody drives")
    assert report["mappings"]["map_calls"] > 100
    assert report["devices"]["accesses"] == 0
    (server,) = servers
    assert not server.windows


def test_without_a_server_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nobody.sock"
    assert main(["run", "-q", "--iommu", f"vfio-user:{path}"]) == 5
    assert f"vfio-user server at {path}: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--iommu", "vfio-user:"), "choose from soft, type1"),
        (("--iommu", "vfio-user"), "choose from soft, type1"),
        (("--iommu", "vfio-user:x", "--devices", "2"), "one device for a socket"),
        (("--iommu", "vfio-user:x", "--uncoordinated"), "run.uncoordinated with vfio-user"),
        (("--iommu", "vfio-user:x", "--device", "00:03.0"), "expected devices.iommu (--iommu)"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["run", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert part in capsys.readouterr().err


def test_a_scenario_names_sockets_where_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "one.toml"
    for text in ('iommu = "vfio-user"', 'sockets = ["/run/x"]'):
        scenario.write_text(f"[devices]\n{text}\n")
        assert main(["run", str(scenario)]) == 2
        assert "sockets where devices.iommu is vfio-user" in capsys.readouterr().err


@contextmanager
def served(path: Path) -> Iterator[list[Server]]:
    """The small server of the tests, for one client at *path*."""
    servers: list[Server] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)
        thread = threading.Thread(target=lambda: servers.append(Server(listener.accept()[0])))
        thread.start()
        yield servers
        thread.join()
        servers[0].join()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
