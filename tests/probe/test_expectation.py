"""What QEMU says over QMP against windows, with a QMP server of our own in QEMU's place."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ramblock import RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.probe import Probe, Rule
from ramblock.probe import expectation as module
from ramblock.probe.expectation import VirtioMemExpectation

P = 4096
REGION = 1 << 32


class Qemu:
    """Answers query-memory-devices, for one monitor after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plugged = 0
        #: It greets nobody and answers nothing, as when its one monitor is taken.
        self.silent = False
        self.monitors = 0
        self.done: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._monitor: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                monitor, _ = self._listener.accept()
            except OSError:
                return
            self.monitors += 1
            self._monitor = monitor
            self.done.append(monitor)
            with suppress(OSError):
                self._talk(monitor)

    def _talk(self, monitor: socket.socket) -> None:
        if self.silent:
            return
        version = {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}
        self._send(monitor, {"QMP": {"version": version, "capabilities": []}})
        buffered = ""
        while not self.silent:
            data = monitor.recv(4096)
            if not data:
                return
            # The client's objects need no newline between them.
            buffered = (buffered + data.decode()).lstrip()
            with suppress(json.JSONDecodeError):
                while buffered:
                    question, end = json.JSONDecoder().raw_decode(buffered)
                    buffered = buffered[end:].lstrip()
                    self._answer(monitor, question)

    def _answer(self, monitor: socket.socket, question: dict[str, Any]) -> None:
        answer: Any = {}
        if question["execute"] == "query-memory-devices":
            answer = [self._device(), {"type": "dimm", "data": {"addr": 0}}]
        reply = {"return": answer}
        if "id" in question:  # the first one has none
            reply["id"] = question["id"]
        self._send(monitor, reply)

    def _device(self) -> dict[str, Any]:
        data = {
            "memaddr": REGION, "max-size": 16 * P, "size": self.plugged, "requested-size": 0,
            "id": "vm0", "node": 0, "block-size": P, "memdev": "/objects/m1",
        }  # fmt: skip
        return {"type": "virtio-mem", "data": data}

    @staticmethod
    def _send(monitor: socket.socket, message: dict[str, Any]) -> None:
        monitor.sendall(json.dumps(message).encode() + b"\r\n")

    def hang_up(self) -> None:
        assert self._monitor is not None
        self._monitor.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._monitor is not None:
            with suppress(OSError):
                self._monitor.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        for monitor in self.done:
            monitor.close()


class Rig:
    def __init__(self, folder: Path) -> None:
        self.probe = Probe(folder / "probe.sock")
        self.probe.start()
        self.block = RamBlock.create("ram", 16 * P)
        self.target = VfioUserTarget(self.probe.path, timeout=60)
        self.expectation = VirtioMemExpectation(self.probe, folder / "qmp.sock")
        self.expectation.start()

    def plug(self, page: int) -> None:
        memory = HostRange(self.block.fd, page * P, self.block.address + page * P, P)
        self.target.map(REGION + page * P, memory)

    def compared(self) -> None:
        """Wait until what is there now was looked at."""
        seen = self.expectation.comparisons
        self.probe.wait_for(lambda: self.expectation.comparisons > seen + 1)

    def close(self) -> None:
        self.expectation.stop()
        self.target.close()
        self.probe.stop()
        self.block.close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_SECONDS", 0.02)
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 0.2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path / "qmp.sock")
    yield qemu
    qemu.close()


def test_windows_that_are_what_is_plugged(rig: Rig, qemu: Qemu) -> None:
    for page in range(4):
        rig.plug(page)
        qemu.plugged += P
    rig.target.map(0, HostRange(rig.block.fd, 0, rig.block.address, P))  # not in the region
    rig.compared()
    device = rig.expectation.devices["vm0"]
    assert (device.plugged, device.mapped, device.agrees) == (4 * P, 4 * P, True)
    assert rig.probe.record.clean


def test_a_difference_that_lasts_is_told_once(rig: Rig, qemu: Qemu) -> None:
    rig.plug(0)
    rig.probe.wait_for(lambda: rig.probe.record.violation_count)
    rig.compared()
    [violation] = rig.probe.record.violations
    assert violation.rule is Rule.EXPECTATION
    assert violation.text == "of vm0 0 B are plugged, and windows have 4 KiB"
    # It is another one when it is another difference.
    rig.plug(1)
    rig.probe.wait_for(lambda: rig.probe.record.violation_count == 2)


def test_a_difference_that_settles_is_none(
    rig: Rig, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 600.0)
    rig.plug(0)
    rig.probe.wait_for(lambda: "vm0" in rig.expectation.devices)
    rig.probe.wait_for(lambda: not rig.expectation.devices["vm0"].agrees)
    qemu.plugged = P
    rig.probe.wait_for(lambda: rig.expectation.devices["vm0"].agrees)
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 0.0)
    rig.compared()
    assert rig.probe.record.clean


def test_qemu_comes_later_goes_and_comes_again(rig: Rig, tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / "qmp.sock")
    try:
        rig.compared()
        qemu.hang_up()
        rig.probe.wait_for(lambda: qemu.monitors > 1)
        rig.plug(0)
        qemu.plugged = P
        rig.compared()
        assert rig.expectation.devices["vm0"].agrees
    finally:
        qemu.close()
    assert rig.probe.record.clean


def test_it_can_be_stopped_while_qemu_says_nothing(rig: Rig, tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / "qmp.sock")
    qemu.silent = True
    try:
        rig.probe.wait_for(lambda: qemu.monitors)
        rig.expectation.stop()
        assert rig.expectation.comparisons == 0
    finally:
        qemu.close()
