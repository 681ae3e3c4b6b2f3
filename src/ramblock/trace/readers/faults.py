# SPDX-License-Identifier: Apache-2.0
"""
The kernel's messages about faults of devices: VT-d's (``DMAR:``) and AMD-Vi's, as in dmesg.

Texts of drivers/iommu/intel/dmar.c, dmar_fault_do_one(), and drivers/iommu/amd/iommu.c,
amd_iommu_report_page_fault(), of 4.x to 7.x.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Fault", "find_fault"]

_ADDRESS = rb"(?:0x)?([0-9a-fA-F]{1,16})(?![0-9a-fA-F])"
_DMAR = re.compile(
    rb"DMAR: ?\[DMA (Read|Write)[^\]\n]{0,40}\] Request device \[([0-9a-fA-F:.x]{1,24})\]"
    rb"(?: PASID \w{1,16})? fault addr " + _ADDRESS
)
# The driver's and device's name stand before it where the device is known; else the event has it.
_AMD = re.compile(
    rb"(?:(\S{1,24}): )?AMD-Vi: ?Event logged \[IO_PAGE_FAULT(?: device=([0-9a-fA-F:.]{1,24}))?"
    rb"(?: (?:domain|pasid)=0x[0-9a-fA-F]{1,16}){0,3} address=" + _ADDRESS + rb" flags=" + _ADDRESS
)
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
    match = _DMAR.search(raw)
    if match is not None:
        return Fault(match[2].decode(), int(match[3], 16), match[1] == b"Write", match.start())
    match = _AMD.search(raw)
    if match is None:
        return None
    device = match[2] or match[1]
    name = None if device is None else device.decode(errors="replace")
    write = bool(int(match[4], 16) & _AMD_WRITE)
    return Fault(name, int(match[3], 16), write, match.start())
