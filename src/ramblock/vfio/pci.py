# SPDX-License-Identifier: Apache-2.0
"""
PCI devices in sysfs; binding to vfio-pci (Documentation/ABI/testing/sysfs-bus-pci).

A device is taken by writing the driver's name to its ``driver_override``, unbinding it from the
driver that it has, and asking the bus to probe again. The undo restores a state and not steps:
driver and override become the earlier ones, however far the binding had come.
"""

from __future__ import annotations

import errno
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from ramblock.errors import BusyError, DmaError, UsageError

__all__ = [
    "PciAddress",
    "bind_to_vfio",
    "driver_of",
    "find_devices",
    "iommu_group",
    "note_open",
    "vfio_cdev",
]

_SYSFS = Path("/sys")
_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE | re.ASCII
)
# The kernel's text for a device without override (drivers/pci/pci-sysfs.c).
_NO_OVERRIDE = "(null)"


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """Where a PCI function is."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """
        Read an address such as ``0000:00:03.0``; without domain it is domain 0.

        :raises UsageError: It is none.
        """
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{text!r} is not a PCI address", value=text, expected="such as 0000:00:03.0"
            )
        domain, bus, device, function = match.groups()
        return cls(int(domain or "0", 16), int(bus, 16), int(device, 16), int(function, 16))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


def _folder(address: PciAddress, sysfs: Path) -> Path:
    folder = sysfs / "bus/pci/devices" / str(address)
    if not folder.is_dir():
        raise DmaError(errno.ENODEV, f"there is no PCI device {address}")
    return folder


def find_devices(vendor: int, device: int, *, sysfs: Path = _SYSFS) -> list[PciAddress]:
    """List the devices with these IDs, by address."""
    found = []
    for folder in (sysfs / "bus/pci/devices").glob("*"):
        try:
            ids = tuple(int((folder / name).read_text(), 16) for name in ("vendor", "device"))
        except (OSError, ValueError):
            continue  # it went away
        if ids == (vendor, device):
            found.append(PciAddress.parse(folder.name))
    return sorted(found)


def driver_of(address: PciAddress, *, sysfs: Path = _SYSFS) -> str | None:
    """
    Name the driver that a device is bound to; None: none.

    :raises DmaError: ENODEV: no such device.
    """
    link = _folder(address, sysfs) / "driver"
    return link.readlink().name if link.is_symlink() else None


def iommu_group(address: PciAddress, *, sysfs: Path = _SYSFS) -> int:
    """
    Tell the number of a device's IOMMU group.

    :raises DmaError: ENODEV: no such device, or no IOMMU stands before it.
    """
    link = _folder(address, sysfs) / "iommu_group"
    if not link.is_symlink():
        raise DmaError(
            errno.ENODEV,
            f"{address} is in no IOMMU group: switch the IOMMU on in firmware, "
            "and on the kernel's command line (intel_iommu=on)",
        )
    return int(link.readlink().name)


def vfio_cdev(address: PciAddress, *, sysfs: Path = _SYSFS, dev: Path = Path("/dev")) -> Path:
    """
    Find the character device of a device that is bound to vfio-pci.

    :raises DmaError: ENODEV: it is not bound to it, or the kernel has no such character devices.
    """
    folder = _folder(address, sysfs) / "vfio-dev"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if not names:
        driver = driver_of(address, sysfs=sysfs) or "no driver"
        raise DmaError(
            errno.ENODEV,
            f"{address} ({driver}) has no VFIO character device: bind it to vfio-pci; "
            "the kernel needs CONFIG_VFIO_DEVICE_CDEV",
        )
    return dev / "vfio/devices" / names[0]


# -- who has a device open in this process ---------------------------------------------------------


class _Opener(Protocol):
    """A part that keeps a device open: its descriptor, or a mapping of one of its regions."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""


# Weakly: a forgotten one is closed.
_open: defaultdict[PciAddress, WeakSet[_Opener]] = defaultdict(WeakSet)


def note_open(address: PciAddress, opener: _Opener) -> None:
    """Note that *address* is open in this process until *opener* is closed."""
    _open[address].add(opener)


def _is_open(address: PciAddress) -> bool:
    return any(not opener.closed for opener in _open[address])


# -- binding ---------------------------------------------------------------------------------------


@contextmanager
def bind_to_vfio(
    address: PciAddress, *, driver: str = "vfio-pci", sysfs: Path = _SYSFS
) -> Iterator[PciAddress]:
    """
    Bind a device to vfio-pci inside a ``with``, and to its earlier driver afterwards.

    :param driver: Another VFIO driver.
    :raises DmaError: No such device or driver, or the kernel refused; driver and override are as
        before.
    :raises BusyError: At the end: the device is still open in this process. It stays bound:
        unbinding would wait, in the kernel and not to be interrupted, until it is closed
        (drivers/vfio/vfio_main.c, vfio_unregister_group_dev()).
    """
    folder = _folder(address, sysfs)
    before = driver_of(address, sysfs=sysfs)
    if before == driver:
        yield address
        return
    if not (sysfs / "bus/pci/drivers" / driver).is_dir():
        raise DmaError(errno.ENODEV, f"there is no driver {driver}: load it (modprobe {driver})")
    override = (folder / "driver_override").read_text().strip()
    try:
        _write(folder / "driver_override", driver)
        _unbind(address, sysfs)
        _write(sysfs / "bus/pci/drivers_probe", str(address))
        now = driver_of(address, sysfs=sysfs)
        if now != driver:
            raise DmaError(
                errno.ENODEV, f"{driver} did not take {address}, which has {now or 'no driver'} now"
            )
        yield address
    finally:
        try:
            _put_back(address, before, override, sysfs)
        except KeyboardInterrupt:
            _put_back(address, before, override, sysfs)
            raise


def _put_back(address: PciAddress, driver: str | None, override: str, sysfs: Path) -> None:
    """
    Bind to *driver*, or to none, with the *override* there was.

    Does nothing where it is so already.
    """
    if _is_open(address):
        raise BusyError(f"{address} is still open: close the device before it is unbound from VFIO")
    _write(
        _folder(address, sysfs) / "driver_override", "" if override == _NO_OVERRIDE else override
    )
    if driver_of(address, sysfs=sysfs) == driver:
        return
    _unbind(address, sysfs)
    if driver is not None:
        _write(sysfs / "bus/pci/drivers" / driver / "bind", str(address))


def _unbind(address: PciAddress, sysfs: Path) -> None:
    if driver_of(address, sysfs=sysfs) is not None:
        _write(_folder(address, sysfs) / "driver/unbind", str(address))


def _write(path: Path, text: str) -> None:
    try:
        # A line end alone clears an override; nothing at all would not reach the kernel.
        path.write_text(f"{text}\n")
    except OSError as error:
        raise DmaError(error.errno or 0, f"writing {text!r} to {path}: {error.strerror}") from error
