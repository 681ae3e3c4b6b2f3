# SPDX-License-Identifier: Apache-2.0
"""
QEMU's own trace of a guest: the events that are asked for, and the lines since the last look.

This reads the double's own log of the moment, line by line as it comes. ``ramblock check`` reads
logs of other people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["TRACED", "QemuLog", "TraceLine", "joined"]

TRACED = (
    "iommufd_*",
    "kvm_convert_memory",
    "kvm_hc_map_gpa_range",
    "kvm_memory_fault",
    "kvm_set_user_memory",
    "kvm_sev_*",
    "ram_block_*",
    "ram_discard*",
    "sev_handle_reset",
    "vfio_container_*",
    "vfio_listener_*",
    "vfio_user_dma_*",
    "vfio_user_version",
    "virtio_mem_*",
)
"""
Events about memory, and what devices may reach; those of a device's own registers are left out.
"""

# -msg timestamp=on: the time of day, without fraction where that is zero (GLib,
# g_date_time_format_iso8601()).
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z) (\w+)(?: (.*))?")


class TraceLine(NamedTuple):
    """One event."""

    number: int
    """Line in the log, from 1."""
    name: str
    text: str
    """Its values as QEMU wrote them."""

    def __str__(self) -> str:
        return f"{self.name} {self.text}".rstrip()

    def numbers(self) -> tuple[int, ...]:
        """Return the hexadecimal numbers of the text, in their order."""
        return tuple(int(word, 16) for word in re.findall(r"\b0x[0-9a-f]+", self.text))


class QemuLog:
    """
    The log of one guest; QEMU writes each line at once.

    :param path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._lines = 0

    def new(self) -> list[TraceLine]:
        """Return the events since the last call."""
        return list(self._read())

    def skip(self) -> None:
        """Forget what was written so far."""
        self.new()

    def _read(self) -> Iterator[TraceLine]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._lines += 1
            # Warnings share the file and are no events.
            if match := _LINE.fullmatch(line):
                yield TraceLine(self._lines, match[2], (match[3] or "").strip())


# Where the conversion is told a second time, by the hypercall's handler; and what is not about
# memory.
_LEFT_OUT = ("kvm_hc_map_gpa_range", "vfio_listener_region_skip")
_JOINED = (
    "iommufd_backend_map_dma",
    "iommufd_backend_map_file_dma",
    "iommufd_backend_unmap_dma",
    "vfio_user_dma_map",
    "vfio_user_dma_unmap",
)
# What iommufd's say at their end where the kernel refused.
_REFUSED = re.compile(r"\(-\d+\)$")
_HOST_ADDRESS = re.compile(r"@0x[0-9a-f]+")


def joined(lines: Iterable[TraceLine]) -> list[str]:
    """
    Return the lines as text, with maps and unmaps that follow each other as one step.

    ``vfio_user_dma_map [0x200000, 0x210000) in 16 calls``; all else is as QEMU wrote it, without
    host addresses. Lines that tell the same a second time are left out, and regions that are
    skipped.
    """
    steps: list[str] = []
    run: tuple[str, int, int, int] | None = None  # name, start, end, calls
    for line in lines:
        if line.name in _LEFT_OUT:
            continue
        joins = line.name in _JOINED and not _REFUSED.search(line.text)
        if joins:
            iova, size = line.numbers()[:2]
            if run is not None and run[0] == line.name and run[2] == iova:
                run = (line.name, run[1], iova + size, run[3] + 1)
                continue
        if run is not None:
            steps.append(_text(*run))
            run = None
        if joins:
            iova, size = line.numbers()[:2]
            run = (line.name, iova, iova + size, 1)
        else:
            steps.append(_HOST_ADDRESS.sub("@HVA", str(line)))
    if run is not None:
        steps.append(_text(*run))
    return steps


def _text(name: str, start: int, end: int, calls: int) -> str:
    return f"{name} [{start:#x}, {end:#x}) in {calls} calls"
