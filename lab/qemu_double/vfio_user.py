# SPDX-License-Identifier: Apache-2.0
"""
A vfio-user device for a guest of the double.

It is ramblock's probe, which knows at each moment what the device may reach.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from lab.qemu_double.guest import ConfidentialGuest
from ramblock.errors import IommuFault
from ramblock.probe import Probe
from ramblock.trace import TraceWriter

__all__ = ["VfioUserDevice"]

_PAGE = 4096


class VfioUserDevice:
    """
    Serves from its creation to :meth:`stop`; also a context manager.

    :param path: Of its socket.
    :param trace: Where the probe's events go; stays the caller's.
    """

    def __init__(self, path: Path, trace: TraceWriter | None = None) -> None:
        self.probe = Probe(path, trace=() if trace is None else (trace,))
        self.probe.start()

    def objects(self) -> list[str]:
        """Return none: it needs nothing beside itself."""
        return []

    def properties(self) -> dict[str, object]:
        """Return the device as QEMU's -device and device_add take it."""
        socket = {"type": "unix", "path": str(self.probe.path)}
        return {"driver": "vfio-user-pci", "socket": socket}

    def pages(self, start: int = 0, end: int = 1 << 64) -> set[int]:
        """Return the numbers of the pages in ``[start, end)`` that the device may reach now."""
        return {
            page
            for window in self.probe.windows
            for page in range(window.address // _PAGE, window.end // _PAGE)
            if start <= page * _PAGE < end
        }

    def reaches(self, gpa: int) -> bool:
        """Read a page as the device; tell whether it could."""
        try:
            self.probe.read(gpa, 8)
        except IommuFault:
            return False
        return True

    def read(self, gpa: int) -> int:
        """
        Read a word as the device.

        :raises IommuFault: It may not.
        """
        return int.from_bytes(self.probe.read(gpa, 8), "little")

    def driver(self, guest: ConfidentialGuest) -> VfioUserDevice:
        """Return the device itself: it needs no driver in the guest."""
        return self

    def refuse_maps_after(self, count: int | None) -> None:
        """
        Take *count* more windows, and refuse others with ENOSPC, as a container at its limit.

        :param count: None: take all.
        """
        self.probe.max_windows = None if count is None else len(self.probe.windows) + count

    def stop(self) -> None:
        """Stop serving."""
        self.probe.stop()

    def __enter__(self) -> VfioUserDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
