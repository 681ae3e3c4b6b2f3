# SPDX-License-Identifier: Apache-2.0
"""The kernel's messages about faults of devices: VT-d's (``DMAR:``) and AMD-Vi's, as in dmesg."""

from __future__ import annotations

from typing import NamedTuple

from ramblock.trace.messages.catalogue import compiled
from ramblock.trace.messages.kernel import AMD_FAULT, DMAR_FAULT

__all__ = ["Fault", "find_fault"]

_AMD_WRITE = 0x20  # EVENT_FLAG_RW


class Fault(NamedTuple):
    """An access that was refused."""

    device: str | None
    address: int
    write: bool
    start: int
    """Where it begins in the line."""


def find_fault(raw: bytes) -> Fault | None:
    """Find a fault in a line."""
    if b"AMD-Vi" not in raw and b"DMAR" not in raw:
        return None
    match = compiled(DMAR_FAULT).search(raw)
    if match is not None:
        return Fault(match[2].decode(), int(match[3], 16), match[1] == b"Write", match.start())
    match = compiled(AMD_FAULT).search(raw)
    if match is None:
        return None
    device = match[2] or match[1]
    name = None if device is None else device.decode(errors="replace")
    write = bool(int(match[4], 16) & _AMD_WRITE)
    return Fault(name, int(match[3], 16), write, match.start())
