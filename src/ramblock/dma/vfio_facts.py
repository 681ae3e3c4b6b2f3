# SPDX-License-Identifier: Apache-2.0
"""This host's facts for explaining errors: limits, module parameters, IOMMU groups."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple

from ramblock.units import KIB

__all__ = [
    "GroupMember",
    "LockedMemory",
    "group_members",
    "locked_memory",
    "module_parameter",
]

_ROOT = Path("/")
# include/uapi/linux/capability.h
_CAP_IPC_LOCK = 14


class GroupMember(NamedTuple):
    """A device of an IOMMU group."""

    address: str
    driver: str | None
    """Name of its driver; None: it has none."""

    def __str__(self) -> str:
        return f"{self.address} ({self.driver or 'no driver'})"


class LockedMemory(NamedTuple):
    """The counts that the kernel compares with RLIMIT_MEMLOCK, in bytes."""

    limit: int | None
    """None: no limit."""
    locked: int
    """VmLck: type1's charge to this process (mm->locked_vm)."""
    pinned: int
    """
    VmPin: memory that iommufd has pinned for it (mm->pinned_vm).

    It charges the user, who may have other processes.
    """
    exempt: bool
    """CAP_IPC_LOCK: neither type1 nor iommufd looks at the limit."""


def module_parameter(module: str, name: str, *, root: Path = _ROOT) -> str | None:
    """Read back a module's parameter; None where the module is not there."""
    try:
        return (root / "sys/module" / module / "parameters" / name).read_text().strip()
    except OSError:
        return None


def group_members(number: int, *, root: Path = _ROOT) -> list[GroupMember]:
    """List the devices of IOMMU group *number* by address; empty where there is no such group."""
    folder = root / "sys/kernel/iommu_groups" / str(number) / "devices"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    return [GroupMember(name, _driver(folder / name)) for name in names]


def _driver(device: Path) -> str | None:
    try:
        return (device / "driver").readlink().name
    except OSError:
        return None


def locked_memory(*, root: Path = _ROOT) -> LockedMemory:
    """Tell how much memory this process may lock, and how much is locked and pinned for it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    status: dict[str, int] = {}
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("VmLck", "VmPin"):
            status[name] = int(value.split()[0]) * KIB
        elif name == "CapEff":
            status[name] = int(value, 16)
    return LockedMemory(
        None if limit == resource.RLIM_INFINITY else limit,
        status.get("VmLck", 0),
        status.get("VmPin", 0),
        bool(status.get("CapEff", 0) >> _CAP_IPC_LOCK & 1),
    )
