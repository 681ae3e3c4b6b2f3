"""The commands of `ramblock check --how qemu`, as they are printed, with a real QEMU."""

import os
import re
import subprocess
import sys
from pathlib import Path

from lab.qemu_double import Double, GuestOptions
from qemu_scenarios import SCENARIOS
from ramblock.check import check_file
from ramblock.cli.check_how import QEMU_EVENTS, RECIPES
from ramblock.trace.findings import FindingKind


def _steps(folder: Path) -> tuple[str, ...]:
    """Carry out what comes before QEMU's start; return the options that it is to have."""
    before, line = RECIPES["qemu"].start.rsplit("qemu-system-x86_64 ... ", 1)
    subprocess.run(["sh", "-e", "-c", before], cwd=folder, check=True)
    words = line.split()
    return tuple(re.sub(r"(?<==)(\w+\.\w+)", rf"{folder}/\1", word) for word in words)


def _verdict(folder: Path) -> int:
    """Carry out what comes after QEMU's end; return the exit code of its check."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    stop = RECIPES["qemu"].stop
    return subprocess.run(["sh", "-c", stop], cwd=folder, env=environment, check=False).returncode


def test_qemu_records_what_the_check_reads(double: Double, tmp_path: Path) -> None:
    options = GuestOptions(tracing=_steps(tmp_path))
    guest = double.guest(options, double.vfio_user_device())
    SCENARIOS["clean"].play(guest, lambda: None)
    output = guest.output()
    guest.end()

    # This QEMU is new enough for all of them, and too new for one.
    lacking = set(re.findall(r"trace event '(\w+)' does not exist", output))
    assert lacking == {"ram_block_discard_range"}
    log = (tmp_path / "qemu.trace").read_text()
    names = {name for group in QEMU_EVENTS.values() for name in group}
    written = {match[1] for match in re.finditer(r"^\S+Z (\w+)", log, re.M)} & names
    assert written >= {
        "kvm_convert_memory",
        "kvm_set_user_memory",
        "ram_block_attributes_state_change",
        "ram_block_discard_shared_range",
        "vfio_user_dma_map",
        "vfio_user_dma_unmap",
    }
    assert _verdict(tmp_path) == 0
    result = check_file(str(tmp_path / "qemu.trace"))
    assert result.error is None
    assert result.by_event["kvm_convert_memory"] == log.count(" kvm_convert_memory ")
    assert result.by_event["vfio_user_dma_map"] == log.count(" vfio_user_dma_map ")


def test_pages_that_stay_mapped_over_a_reset_are_found(double: Double, tmp_path: Path) -> None:
    options = GuestOptions(tracing=_steps(tmp_path), resets=True)
    guest = double.guest(options, double.vfio_user_device())
    SCENARIOS["reset"].play(guest, lambda: None)
    guest.end()

    assert _verdict(tmp_path) == 1
    assert check_file(str(tmp_path / "qemu.trace")).counts[FindingKind.STALE].count > 0


def test_event_that_a_qemu_does_not_have_is_a_warning_and_the_others_are_recorded(
    double: Double, tmp_path: Path
) -> None:
    options = _steps(tmp_path)
    with (tmp_path / "events.txt").open("a") as file:
        file.write("an_event_of_the_future\nkvm_hc_map_gpa_range\n")
    guest = double.guest(GuestOptions(tracing=options))
    guest.convert(2 << 20, 4096, private=False)

    # Both of QEMU's options for a log set the same one, so it is in the log or in the output.
    said = guest.output() + (tmp_path / "qemu.trace").read_text()
    assert "'an_event_of_the_future' does not exist" in said
    assert "kvm_convert_memory start 0x200000" in (tmp_path / "qemu.trace").read_text()
