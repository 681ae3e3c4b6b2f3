"""
Sessions of hostile peers, from a seed, in both roles: no error of our own, and nothing is left.

``make fuzz`` plays a million messages of them against a probe in a process of its own.
"""

import logging
import socket
import threading
from pathlib import Path

import pytest

from descriptors import open_descriptors
from hostile_sessions import Files, play_client, play_server, use_target
from ramblock import RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.probe import Probe
from ramblock.probe import session as session_module
from ramblock.trace import TraceWriter

P = 4096


@pytest.mark.parametrize("touch", [False, True], ids=["quiet", "touching"])
def test_hostile_clients(
    tmp_path: Path,
    touch: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Many of them owe an answer.
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.1)
    before = open_descriptors()
    path = tmp_path / "probe.sock"
    with (
        TraceWriter(tmp_path / "trace") as trace,
        Files() as files,
        Probe(path, touch=touch, scribble=touch, trace=(trace,)) as probe,
    ):
        messages = sum(play_client(path, seed, files) for seed in range(40))
        probe.wait_for(lambda: probe.client is None)
        VfioUserTarget(path).close()
        assert probe.record.violation_count > 40
    assert probe.error is None
    assert trace.error is None
    assert messages > 1000
    assert not caplog.records, [record.exc_text for record in caplog.records]
    assert open_descriptors() == before


def test_hostile_servers(caplog: pytest.LogCaptureFixture) -> None:
    before = open_descriptors()
    refused = failed = messages = 0
    caplog.set_level(logging.ERROR)
    with RamBlock.create("ram", P) as block, Files() as files:
        memory = HostRange(block.fd, 0, block.address, P)
        for seed in range(60):
            ours, theirs = socket.socketpair()
            counts: list[int] = []
            thread = threading.Thread(
                target=lambda: counts.append(play_server(theirs, seed, files))  # noqa: B023
            )
            thread.start()
            target = use_target(ours, seed, memory)
            thread.join(60)
            assert not thread.is_alive()
            messages += counts[0]
            refused += target is None
            failed += target is not None and target.failure is not None
    assert messages > 1000
    assert 5 < failed < 55
    assert not caplog.records, [record.exc_text for record in caplog.records]
    assert open_descriptors() == before
