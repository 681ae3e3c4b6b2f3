"""
The recordings of QEMU's confidential guests in tests/data, made again and compared.

With RAMBLOCK_RECORD=FOLDER each test leaves what it made there: that is how those in tests/data
were made.
"""

import gzip
import os
import shutil
from pathlib import Path

import pytest

from lab.qemu_double import Double, QemuLog
from qemu_scenarios import SCENARIOS, without_chance
from ramblock.trace import TraceWriter

_DATA = Path(__file__).parent.parent / "data"


def _keep(path: Path, name: str) -> None:
    if folder := os.environ.get("RAMBLOCK_RECORD"):
        with path.open("rb") as source, gzip.open(Path(folder) / f"{name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)


def _recorded(name: str, folder: Path) -> Path:
    path = folder / "recorded.log"
    path.write_bytes(gzip.decompress((_DATA / f"{name}.gz").read_bytes()))
    return path


@pytest.mark.parametrize("name", SCENARIOS)
def test_recording_is_what_qemu_writes(double: Double, tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    trace = tmp_path / "probe.jsonl"
    with TraceWriter(trace) as writer:
        device = double.vfio_user_device(writer)
        guest = double.guest(scenario.options, device)

        def second() -> None:
            if name == "hot-plug":
                guest.plug(double.vfio_user_device(), "second")
            else:
                device.refuse_maps_after(4)

        scenario.play(guest, second)
        guest.end()
        device.stop()
    _keep(guest.log.path, f"qemu-snp-{name}.trace")
    _keep(trace, f"probe-snp-{name}.jsonl")

    made = without_chance(QemuLog(guest.log.path).new())
    recorded = without_chance(QemuLog(_recorded(f"qemu-snp-{name}.trace", tmp_path)).new())
    assert made == recorded
