# SPDX-License-Identifier: Apache-2.0
"""The kernel: its version, how it was configured, and whether its IOMMU faults can be seen."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ramblock.doctor.line import Line, Status

__all__ = ["look"]

#: KVM_SET_MEMORY_ATTRIBUTES and guest_memfd came with Linux 6.8; VFIO's device files for iommufd
#: with 6.6.
_OLDEST = (6, 8)
_OPTIONS = (
    "KVM",
    "KVM_SW_PROTECTED_VM",
    "KVM_INTEL_TDX",
    "KVM_AMD_SEV",
    "INTEL_IOMMU",
    "AMD_IOMMU",
    "VFIO_CONTAINER",
    "VFIO_DEVICE_CDEV",
    "IOMMUFD",
    "IOMMUFD_VFIO_CONTAINER",
)


def look(root: Path) -> Iterator[Line]:
    """Look at the kernel."""
    release = os.uname().release
    yield _version(release)
    yield _config(root, release)
    yield _fault_events(root)


def _version(release: str) -> Line:
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    return Line(
        name="kernel",
        status=Status.GOOD if version >= _OLDEST else Status.LACKING,
        found=f"Linux {release}",
        why="page attributes of KVM and guest_memfd came with 6.8,"
        " VFIO's device files for iommufd with 6.6",
        todo="" if version >= _OLDEST else "a kernel of 6.8 or newer",
    )


def _config(root: Path, release: str) -> Line:
    text = _read_config(root, release)
    why = "a feature that is neither built in nor a module cannot be loaded"
    if text is None:
        return Line(
            name="kernel configuration",
            status=Status.UNSEEN,
            found="neither /proc/config.gz nor the kernel's file in /boot can be read",
            why=why,
        )
    values = dict(re.findall(r"^CONFIG_(\w+)=(\S+)$", text, re.MULTILINE))
    there = [f"{name}={values[name]}" for name in _OPTIONS if name in values]
    missing = [name for name in _OPTIONS if name not in values]
    found = ", ".join(there) or "none of the wanted ones"
    if missing:
        found += f"; not set: {', '.join(missing)}"
    return Line(name="kernel configuration", status=Status.NOTE, found=found, why=why)


def _read_config(root: Path, release: str) -> str | None:
    try:
        return gzip.decompress((root / "proc/config.gz").read_bytes()).decode(errors="replace")
    except (OSError, EOFError):
        pass
    for path in (root / f"boot/config-{release}", root / f"lib/modules/{release}/config"):
        try:
            return path.read_text(errors="replace")
        except OSError:
            continue
    return None


def _fault_events(root: Path) -> Line:
    why = (
        "a device's access to a page that was made private faults in the IOMMU: this event shows it"
    )
    tracefs = root / "sys/kernel/tracing"
    event = tracefs / "events/iommu/io_page_fault"
    if not os.access(tracefs, os.R_OK | os.X_OK):
        return Line(
            name="IOMMU faults in traces",
            status=Status.UNSEEN,
            found="/sys/kernel/tracing cannot be read",
            why=why,
            todo="be root, and mount tracefs there",
        )
    if event.is_dir():
        return Line(
            name="IOMMU faults in traces",
            status=Status.GOOD,
            found="tracefs has iommu:io_page_fault",
            why=why,
        )
    return Line(
        name="IOMMU faults in traces",
        status=Status.NOTE,
        found="tracefs has no iommu:io_page_fault; faults are in the kernel's log alone",
        why=why,
    )
