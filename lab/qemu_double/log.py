# SPDX-License-Identifier: Apache-2.0
"""
QEMU's own trace of a guest: which events are asked for, and what was written since a moment.

This reads the double's own log of the moment, line by line as it comes. ``ramblock check`` reads
logs of other people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["TRACED", "QemuLog", "TraceLine"]

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
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z) (\w+) ?(.*)")


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
                yield TraceLine(self._lines, match[2], match[3].strip())
