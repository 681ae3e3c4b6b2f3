"""
A real VMM on the probe's socket: the lab's QEMU, with a Linux guest whose memory grows and shrinks
(virtio-mem).

With RAMBLOCK_RECORD=FOLDER each test leaves its traces there: that is how the recordings in
tests/data were made.
"""

import gzip
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from message_samples import explained
from qemu_guest import BLOCK_SIZE, MAX_SIZE, REGION, Qmp, qemu_command
from ramblock.probe import Window
from ramblock.testing.plugin import ProbeFactory, Vmm, VmmProbe

pytestmark = pytest.mark.slow

_MIB = 1 << 20
# Under emulation, on a busy machine.
_PATIENCE = 60.0
# Everything that has to do with what is mapped for devices; kvm_* only says something with KVM.
_TRACED = (
    "kvm_convert_memory",
    "kvm_set_user_memory",
    "ram_block_attributes_*",
    "ram_block_discard_shared_range",
    "vfio_container_*",
    "vfio_listener_*",
    "vfio_user_dma_*",
    "vfio_user_version",
    "virtio_mem_*",
)


@pytest.fixture
def marker() -> str:
    return secrets.token_hex(16)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's: the path of a socket may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ramblock-") as name:
        yield Path(name)


@pytest.fixture
def record() -> Callable[[Path, str], None]:
    """Keep a file as a recording, where somebody wants that."""

    def keep(path: Path, name: str) -> None:
        if folder := os.environ.get("RAMBLOCK_RECORD"):
            with path.open("rb") as source, gzip.open(Path(folder) / f"{name}.gz", "wb") as target:
                shutil.copyfileobj(source, target)

    return keep


def _traced(folder: Path) -> list[str]:
    """Return arguments with which QEMU writes a trace of its own to the folder."""
    (folder / "events").write_text("".join(f"{name}\n" for name in _TRACED))
    return ["-msg", "timestamp=on", "-trace", f"events={folder}/events,file={folder}/qemu.trace"]


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = monotonic() + _PATIENCE
    while not condition():
        assert monotonic() < deadline, f"not within {_PATIENCE:.0f} s: {what}"
        sleep(0.1)


def _plug(qmp: Qmp, mib: int) -> None:
    qmp.request(mib * _MIB)
    _wait_until(lambda: qmp.plugged() == mib * _MIB, f"{mib} MiB are plugged")


def _in_region(windows: list[Window]) -> list[Window]:
    return [window for window in windows if REGION <= window.address < REGION + MAX_SIZE]


def _ranges_with_data(vmm: Vmm) -> Iterator[tuple[int, int]]:
    """
    Yield what the memfd of the virtio-mem device really has in it, as guest addresses (start, end).
    """
    for link in Path(f"/proc/{vmm.process.pid}/fd").iterdir():
        if "memfd:" in str(link.readlink()) and link.stat().st_size == MAX_SIZE:
            break
    else:
        pytest.fail("QEMU has no such memfd")
    fd = os.open(link, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here on
                return
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield REGION + start, REGION + end
    finally:
        os.close(fd)


def test_windows_follow_what_is_plugged(
    ramblock_probe: ProbeFactory,
    marker: str,
    folder: Path,
    record: Callable[[Path, str], None],
) -> None:
    trace = folder / "probe.jsonl"
    probe = ramblock_probe(trace=trace)
    vmm = probe.run_vmm(*qemu_command(folder, probe.path, marker, *_traced(folder)))
    with Qmp(folder / "qmp") as qmp:
        probe.wait_for(lambda: "the guest is up" in vmm.output(), _PATIENCE)
        probe.settle()
        probe.assert_not_mapped(REGION, MAX_SIZE)
        for mib in (256, 100, 300, 0, 64):
            _plug(qmp, mib)
            probe.settle()

            assert probe.total(REGION, MAX_SIZE) == qmp.plugged() == mib * _MIB
            assert all(w.size == BLOCK_SIZE for w in _in_region(probe.windows))
            # Not only as many bytes, but those where memory is: nothing else of the device has any.
            for start, end in _ranges_with_data(vmm):
                probe.assert_mapped(start, end - start)
            if mib:
                _check_memory(probe, qmp, marker, folder)
        windows = {(window.address, window.size) for window in probe.windows}
    probe.stop()

    assert _mapped_at_the_end(trace) == windows
    record(trace, "probe-qemu-lenient.jsonl")
    record(folder / "qemu.trace", "qemu-lenient.trace")


def _check_memory(probe: VmmProbe, qmp: Qmp, marker: str, folder: Path) -> None:
    """
    The device reads what the guest has written, and what QEMU reads at the same guest addresses.
    """
    found = 0

    def guest_has_written() -> bool:
        nonlocal found
        with qmp.paused():
            found = sum(
                probe.read(window.address, window.size).count(marker.encode())
                for window in _in_region(probe.windows)
            )
        return found * len(marker) > 4 * _MIB

    _wait_until(guest_has_written, f"the guest's marker in the windows, it is there {found} times")
    with qmp.paused():
        windows = [*_in_region(probe.windows), *(w for w in probe.windows if w.file is not None)]
        for window in random.Random(marker).sample(windows, 12):
            size = min(window.size, BLOCK_SIZE)
            expected = qmp.memory(window.address, size, folder / "memory")
            assert probe.read(window.address, size) == expected, window


def _mapped_at_the_end(trace: Path) -> set[tuple[int, int]]:
    """Return what a trace says was mapped before the client left, as (address, size)."""
    mapped: dict[int, int] = {}
    for event in _events(trace):
        match event["event"]:
            case "map":
                mapped[event["iova"]] = event["size"]
            case "unmap":
                gone = range(event["iova"], event["iova"] + event["size"])
                mapped = {start: size for start, size in mapped.items() if start not in gone}
            case "disconnect":
                break
    return set(mapped.items())


def _events(trace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trace.read_text().splitlines() if line.endswith("}")]


def test_exact_unmaps_show_the_windows_that_qemu_leaves(
    marker: str, folder: Path, record: Callable[[Path, str], None]
) -> None:
    # By the command, as somebody would run it.
    trace, output = folder / "probe.jsonl", folder / "output"
    command = ["--unmap", "exact", "--expect", "virtio-mem", "--qmp", f"{folder}/qmp-probe"]
    command += ["--socket", f"{folder}/probe.sock", "--touch", "--trace", str(trace)]
    probe = Vmm([sys.executable, "-m", "ramblock", "probe", *command], output)
    try:
        _wait_until(lambda: "listening" in probe.output(), "the probe listens")
        _grow_and_shrink(probe, folder, marker)
    finally:
        status = probe.stop()

    events = _events(trace)
    stale = [event for event in events if event["event"] == "stale"]
    # One unmap for a whole memory block of Linux, 128 MiB, that was mapped in blocks of the device.
    assert [(event["iova"], event["size"]) for event in stale] == [
        (REGION + 128 * _MIB + number * BLOCK_SIZE, BLOCK_SIZE) for number in range(64)
    ]
    assert {(event["unmap_iova"], event["unmap_size"]) for event in stale} == {
        (REGION + 128 * _MIB, 128 * _MIB)
    }
    assert {(event["iova"], event["size"]) for event in stale} <= _mapped_at_the_end(trace)
    assert status == 1
    assert "64 stale windows" in probe.output()
    assert "128 MiB are plugged, and windows have 256 MiB" in probe.output()
    assert "memory that is not there" not in probe.output()
    record(trace, "probe-qemu-exact.jsonl")
    record(folder / "qemu.trace", "qemu-exact.trace")


def _grow_and_shrink(probe: Vmm, folder: Path, marker: str) -> None:
    vmm = Vmm(
        qemu_command(folder, folder / "probe.sock", marker, *_traced(folder)), folder / "console"
    )
    try:
        _wait_until(lambda: "the guest is up" in vmm.output(), "the guest is up")
        with Qmp(folder / "qmp") as qmp:
            for mib in (256, 100):
                _plug(qmp, mib)
            _wait_until(lambda: "windows differ" in probe.output(), "the windows differ")
            # The memory behind the stale windows is freed: what is left lies below them.
            assert all(end <= REGION + 128 * _MIB for _, end in _ranges_with_data(vmm))
            # QEMU cannot map anew what it has not unmapped, so it refuses the guest's request, and
            # the guest stays small.
            qmp.request(300 * _MIB)
            _wait_until(lambda: "overlap" in probe.output(), "a window overlaps")
            _wait_until(lambda: "of vm0 128 MiB" in probe.output(), "the windows differ still")
            assert qmp.plugged() == 128 * _MIB
        assert "qemu-discard-unmap-failed" in explained(vmm.output())
    finally:
        vmm.stop()
        for program in (vmm, probe):  # pytest shows it where the test has failed
            sys.stdout.write(program.output())
