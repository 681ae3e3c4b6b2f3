"""
QEMU's confidential guests on a real kernel, recorded twice: by QEMU's log and by the kernel's
tracepoints.

With RAMBLOCK_RECORD=FOLDER each test leaves what it made there: that is how the recordings in
tests/data were made. What does not depend on time is compared with those.
"""

import gzip
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from ftrace_recording import recorded
from lab.qemu_double import Container, Double, QemuLog, Way
from qemu_scenarios import SCENARIOS, without_chance
from ramblock.vfio import IommuTestdev

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_DATA = Path(__file__).parent.parent / "data"
_RECORDINGS = (
    ("clean", Container.TYPE1),
    ("clean", Container.IOMMUFD),
    ("reset", Container.TYPE1),
    ("border", Container.TYPE1),
    ("reset", Container.IOMMUFD),
    ("border", Container.IOMMUFD),
)
# The guest's RAM from 256 KiB on: below it are the addresses of the firmware's metadata.
_RAM = range(0x40000, 64 << 20)
_KERNEL_EVENT = re.compile(
    r": (?:(?P<verb>map|unmap): IOMMU: iova=(?P<iova>0x[0-9a-f]+) - (?P<iova_end>0x[0-9a-f]+)"
    r"|kvm_vm_set_mem_attributes: (?P<start>0x[0-9a-f]+) -- (?P<end>0x[0-9a-f]+) "
    r"\[(?P<attributes>0x[0-9a-f]+)\])"
)


def _keep(path: Path, name: str) -> None:
    if folder := os.environ.get("RAMBLOCK_RECORD"):
        with path.open("rb") as source, gzip.open(Path(folder) / f"{name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)


def _unpacked(name: str, folder: Path) -> Path:
    path = folder / f"recorded-{name}"
    path.write_bytes(gzip.decompress((_DATA / f"{name}.gz").read_bytes()))
    return path


def _kernel_events(lines: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return maps, unmaps and attributes of the guest's RAM as (what, start, end)."""
    found = []
    for line in lines:
        match = _KERNEL_EVENT.search(line)
        if match is None:
            continue
        if match["verb"]:
            event = (match["verb"], int(match["iova"], 16), int(match["iova_end"], 16))
        else:
            start, end = int(match["start"], 16) << 12, int(match["end"], 16) << 12
            event = (f"attributes {match['attributes']}", start, end)
        if event[1] in _RAM:
            found.append(event)
    return found


@pytest.mark.parametrize(
    ("scenario", "container"),
    _RECORDINGS,
    ids=[f"{name}-{container.value}" for name, container in _RECORDINGS],
)
def test_recordings_are_what_qemu_and_the_kernel_write(
    tmp_path: Path, scenario: str, container: Container
) -> None:
    name = f"{scenario}-{container.value}"
    kernel = tmp_path / "ftrace.txt"
    ids = (IommuTestdev.VENDOR, IommuTestdev.DEVICE)
    with Double(Way.REAL) as double:
        assigned = double.assigned_device(*ids, container)
        with recorded(kernel):
            guest = double.guest(SCENARIOS[scenario].options, assigned)
            SCENARIOS[scenario].play(guest, lambda: None)
        guest.end()
        made = without_chance(QemuLog(guest.log.path).new())
        _keep(guest.log.path, f"qemu-snp-{name}.trace")
        _keep(kernel, f"ftrace-snp-{name}.txt")
        # QEMU's log has the time of day, the kernel's events have CLOCK_MONOTONIC.
        clock = tmp_path / "clock"
        clock.write_text(f"{time.time_ns() - time.monotonic_ns()}\n")
        _keep(clock, f"clock-snp-{name}.txt")

    before = QemuLog(_unpacked(f"qemu-snp-{name}.trace", tmp_path)).new()
    assert made == without_chance(before)
    events = _kernel_events(kernel.read_text().splitlines())
    recording = _unpacked(f"ftrace-snp-{name}.txt", tmp_path)
    assert events == _kernel_events(recording.read_text().splitlines())
    assert len(events) > 20
