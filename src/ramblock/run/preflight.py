# SPDX-License-Identifier: Apache-2.0
"""The needs of a run on real parts: checked before anything is touched, and told all at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ramblock.errors import DmaError, UsageError
from ramblock.vfio import EduDevice, IommuTestdev, PciAddress, find_devices, iommu_group

__all__ = ["choose_devices", "refuse_unless_ready"]

_ROOT = Path("/")
_KINDS = (EduDevice, IommuTestdev)
_KNOWN = "edu (1234:11e8) and iommu-testdev (1b36:0005)"


def choose_devices(named: Sequence[str], *, root: Path = _ROOT) -> list[PciAddress]:
    """
    Choose the devices of a run: the named ones, else the only edu and iommu-testdev.

    :raises UsageError: A name is no PCI address, or one device is named twice; or there are several
        of a kind, and none is named.
    """
    if named:
        addresses = [PciAddress.parse(text) for text in named]
        if len(set(addresses)) < len(addresses):
            raise UsageError("--device: one device is named twice", value=list(named))
        return addresses
    chosen = []
    for kind in _KINDS:
        found = find_devices(kind.VENDOR, kind.DEVICE, sysfs=root / "sys")
        if len(found) > 1:
            raise UsageError(
                f"there are {len(found)} devices {kind.VENDOR:04x}:{kind.DEVICE:04x}:"
                f" {', '.join(map(str, found))}",
                value=found,
                expected="--device to name those that are meant",
            )
        chosen += found
    return chosen


def refuse_unless_ready(kind: str, devices: Sequence[PciAddress], *, root: Path = _ROOT) -> None:
    """
    Refuse a run with ``--iommu`` *kind* on a host that cannot do it.

    :raises UsageError: The text lists each lack with its remedy, one line each. Nothing was
        touched.
    """
    no_iommu = _iommu(root)
    problems = [*no_iommu, *_interface(kind, root), *_devices(devices, root)]
    if not no_iommu:
        problems += _groups(devices, root)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UsageError(f"--iommu {kind} cannot work on this host:{lines}", value=kind)


def _iommu(root: Path) -> list[str]:
    groups = root / "sys/kernel/iommu_groups"
    if groups.is_dir() and any(groups.iterdir()):
        return []
    return [
        (
            "no IOMMU is active: switch it on in firmware and on the kernel's command line"
            " (intel_iommu=on, amd_iommu=on)"
        )
    ]


def _interface(kind: str, root: Path) -> list[str]:
    if kind == "type1":
        path, what = "dev/vfio/vfio", "CONFIG_VFIO_CONTAINER; modprobe vfio_iommu_type1"
    else:
        path, what = "dev/iommu", "CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; modprobe iommufd"
    problems = []
    if not (root / path).exists():
        problems.append(f"there is no /{path}: the kernel needs {what}")
    elif not os.access(root / path, os.R_OK | os.W_OK):
        problems.append(
            f"/{path} may not be opened: be root, or let a udev rule give the user access"
        )
    if not (root / "sys/bus/pci/drivers/vfio-pci").is_dir():
        problems.append("there is no driver vfio-pci: modprobe vfio-pci (CONFIG_VFIO_PCI)")
    return problems


def _devices(devices: Sequence[PciAddress], root: Path) -> list[str]:
    if not devices:
        return [f"there is no device to drive: only {_KNOWN} of QEMU are known"]
    problems = []
    for address in devices:
        folder = root / "sys/bus/pci/devices" / str(address)
        try:
            ids = tuple(int((folder / name).read_text(), 16) for name in ("vendor", "device"))
        except OSError:
            problems.append(f"there is no PCI device {address}")
            continue
        if ids not in [(kind.VENDOR, kind.DEVICE) for kind in _KINDS]:
            problems.append(
                f"{address} is {ids[0]:04x}:{ids[1]:04x}: only {_KNOWN} of QEMU are known"
            )
    return problems


def _groups(devices: Sequence[PciAddress], root: Path) -> list[str]:
    problems = []
    first_in: dict[int, PciAddress] = {}
    for address in devices:
        try:
            group = iommu_group(address, sysfs=root / "sys")
        except DmaError as error:
            problems.append(str(error.args[-1]))
            continue
        first = first_in.setdefault(group, address)
        if first != address:
            # A group is in one container or address space at a time, and each device of a run has
            # one of its own.
            problems.append(
                f"{first} and {address} are both in IOMMU group {group}:"
                " name one of them (--device)"
            )
    return problems
