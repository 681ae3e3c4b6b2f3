# SPDX-License-Identifier: Apache-2.0
"""IOMMU, VFIO and iommufd: groups and members, device files, limits, cutting of mappings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ramblock.dma.descriptor import Descriptor
from ramblock.dma.iommufd_probe import why_not_cutting
from ramblock.dma.vfio_facts import GroupMember, group_members, module_parameter
from ramblock.doctor.line import Line, Purpose, Status
from ramblock.errors import DmaError
from ramblock.units import PAGE_SIZE, format_size

__all__ = ["look"]

_BOTH = (Purpose.VFIO, Purpose.IOMMUFD)
_SHOWN = 3


def look(root: Path) -> Iterator[Line]:
    """Look at the containers that map for devices."""
    yield _groups(root)
    yield from _viability(root)
    yield _driver(root)
    yield _container(root)
    yield _entry_limit(root)
    yield _interrupts(root)
    yield from _iommufd(root)
    yield _vhost(root)


def _numbers(root: Path) -> list[int]:
    try:
        names = [entry.name for entry in (root / "sys/kernel/iommu_groups").iterdir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def _groups(root: Path) -> Line:
    numbers = _numbers(root)
    return Line(
        name="IOMMU",
        status=Status.GOOD if numbers else Status.LACKING,
        found=f"{len(numbers)} groups of devices" if numbers else "no IOMMU groups",
        why="without an IOMMU no device can be assigned",
        todo=""
        if numbers
        else "switch it on in firmware and on the kernel's command line"
        " (intel_iommu=on, amd_iommu=on)",
        needed_for=_BOTH,
    )


def _viability(root: Path) -> Iterator[Line]:
    """Say which groups hold devices that would have to leave their drivers together."""
    shared: list[tuple[int, list[GroupMember]]] = []
    for number in _numbers(root):
        # Bridges stay with the host (drivers/vfio/pci/vfio_pci_core.c).
        members = [each for each in group_members(number, root=root) if each.driver != "pcieport"]
        if len(members) > 1:
            shared.append((number, members))
    if not shared:
        return
    text = "; ".join(
        f"{number}: {', '.join(map(str, members))}" for number, members in shared[:_SHOWN]
    )
    if len(shared) > _SHOWN:
        text += f"; and {len(shared) - _SHOWN} more"
    yield Line(
        name="groups of several devices",
        status=Status.NOTE,
        found=text,
        why="all devices of a group go to one guest, and none of them may keep"
        " a driver of the host",
        todo="bind all of a group to vfio-pci, or use a slot behind a root port with ACS",
    )


def _driver(root: Path) -> Line:
    there = (root / "sys/bus/pci/drivers/vfio-pci").is_dir()
    return Line(
        name="vfio-pci",
        status=Status.GOOD if there else Status.LACKING,
        found="loaded" if there else "not loaded",
        why="the driver that hands PCI devices to user space",
        todo="" if there else "modprobe vfio-pci (CONFIG_VFIO_PCI)",
        needed_for=_BOTH,
    )


def _device(root: Path, name: str, path: str, why: str, todo: str, purpose: Purpose) -> Line:
    file = root / path
    if not file.exists():
        status, found = Status.LACKING, f"there is no /{path}"
    elif not os.access(file, os.R_OK | os.W_OK):
        status, found = Status.UNSEEN, f"/{path} may not be opened by this user"
        todo = "be root, or let a udev rule give the user access"
    else:
        status, found, todo = Status.GOOD, f"/{path} can be used", ""
    return Line(name=name, status=status, found=found, why=why, todo=todo, needed_for=(purpose,))


def _container(root: Path) -> Line:
    return _device(
        root,
        "VFIO type1",
        "dev/vfio/vfio",
        "most VMMs map with it; it cannot cut, so each page that may be converted is a mapping",
        "modprobe vfio_iommu_type1 (CONFIG_VFIO_CONTAINER)",
        Purpose.VFIO,
    )


def _entry_limit(root: Path) -> Line:
    value = module_parameter("vfio_iommu_type1", "dma_entry_limit", root=root)
    why = (
        "a container has at most so many mappings;"
        " with one for each 4 KiB page a guest shares no more than this"
    )
    todo = (
        "vfio_iommu_type1.dma_entry_limit=4194304 for 16 GiB, before the guest starts;"
        " or iommufd, which has no limit"
    )
    if value is None or not value.isdecimal():
        return Line(
            name="dma_entry_limit",
            status=Status.NOTE,
            found="not known: vfio_iommu_type1 is not loaded",
            why=why,
        )
    shared = format_size(int(value) * PAGE_SIZE)
    return Line(
        name="dma_entry_limit",
        status=Status.NOTE,
        found=f"{int(value):,}, which is {shared} in pages of 4 KiB",
        why=why,
        todo=todo,
    )


def _interrupts(root: Path) -> Line:
    values = [
        f"{module}: {value}"
        for module in ("vfio_iommu_type1", "iommufd")
        if (value := module_parameter(module, "allow_unsafe_interrupts", root=root)) is not None
    ]
    return Line(
        name="unsafe interrupts",
        status=Status.NOTE,
        found=", ".join(values) or "not known: neither module is loaded",
        why="without interrupt remapping attaching a device is EPERM, unless this is Y;"
        " then a device can send any interrupt",
    )


def _iommufd(root: Path) -> Iterator[Line]:
    line = _device(
        root,
        "iommufd",
        "dev/iommu",
        "mappings without a limit, and where the kernel cuts them one for each run of pages",
        "modprobe iommufd (CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV)",
        Purpose.IOMMUFD,
    )
    yield line
    why = "with cutting one mapping covers a whole run of shared pages; without it each page is one"
    if line.status is not Status.GOOD:
        yield Line(name="cutting", status=Status.UNSEEN, found="iommufd cannot be asked", why=why)
        return
    try:
        fd = os.open(root / "dev/iommu", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield Line(name="cutting", status=Status.UNSEEN, found=str(error.strerror), why=why)
        return
    descriptor = Descriptor(fd, "/dev/iommu")
    try:
        reason = why_not_cutting(descriptor)
    except DmaError as error:
        reason = str(error)
    finally:
        descriptor.close()
    yield Line(
        name="cutting",
        status=Status.GOOD if reason is None else Status.LACKING,
        found="a scratch mapping was cut" if reason is None else f"does not cut: {reason}",
        why=why,
        todo=""
        if reason is None
        else "a newer kernel; until then each page that may be converted is a mapping",
    )


def _vhost(root: Path) -> Line:
    value = module_parameter("vhost", "max_iotlb_entries", root=root)
    why = "vhost-vdpa has at most so many mappings, however large the guest"
    if value is None or not value.isdecimal():
        return Line(
            name="vhost max_iotlb_entries",
            status=Status.NOTE,
            found="not known: vhost is not loaded",
            why=why,
        )
    return Line(
        name="vhost max_iotlb_entries",
        status=Status.NOTE,
        found=f"{int(value):,}, which is {format_size(int(value) * PAGE_SIZE)} in pages of 4 KiB",
        why=why,
        todo="it can be set only when vhost is loaded: modprobe vhost max_iotlb_entries=N",
    )
