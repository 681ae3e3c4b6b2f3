"""The lab's two devices behind each kind of target: what the tests of real targets start from."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import cached_property
from pathlib import Path

from descriptors import open_descriptors
from lab_faults import FaultLog
from ramblock.dma import HostRange, IommufdIoas, Type1Container
from ramblock.units import PAGE_SIZE
from ramblock.vfio import (
    EduDevice,
    IommuTestdev,
    PciAddress,
    VfioDevice,
    bind_to_vfio,
    find_devices,
)

__all__ = [
    "BASE",
    "BOUNCE",
    "Rig",
    "Way",
    "address_of_edu",
    "address_of_testdev",
    "entry_limit",
    "host_range",
    "open_rig",
    "wait_for_fault",
]

#: Where the guests of these tests are: above 4 GiB, where the kernel's own DMA addresses never are.
BASE = 1 << 32
#: Where a page for handing data to edu is.
BOUNCE = 1 << 31

_PATIENCE_SECONDS = 20.0
_POLL_SECONDS = 0.1
_ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


class Way(Enum):
    """How memory gets to the device."""

    TYPE1 = "type1"
    NATIVE = "iommufd-native"
    CUTTING = "iommufd-cutting"

    def open_target(self) -> Type1Container | IommufdIoas:
        """Make a target of this kind, without devices."""
        if self is Way.TYPE1:
            return Type1Container()
        return IommufdIoas(cutting=self is Way.CUTTING)


def address_of_edu() -> PciAddress:
    [address] = find_devices(EduDevice.VENDOR, EduDevice.DEVICE)
    return address


def address_of_testdev() -> PciAddress:
    [address] = find_devices(IommuTestdev.VENDOR, IommuTestdev.DEVICE)
    return address


class Rig:
    """A target with both devices behind it. Drivers are made when they are first used."""

    def __init__(self, way: Way, target: Type1Container | IommufdIoas, stack: ExitStack) -> None:
        self.way = way
        self.target = target
        self._stack = stack

    def open(self, address: PciAddress) -> VfioDevice:
        """Open a device; it is closed with the rig at the latest."""
        if isinstance(self.target, Type1Container):
            device = VfioDevice.open_by_group(address, self.target)
        else:
            device = VfioDevice.open_by_cdev(address, self.target)
        return self._stack.enter_context(device)

    @cached_property
    def testdev(self) -> IommuTestdev:
        return IommuTestdev(self.open(address_of_testdev()))

    def reopen_testdev(self) -> None:
        """Open it again, after it was closed."""
        del self.testdev
        _ = self.testdev

    @cached_property
    def edu(self) -> EduDevice:
        return EduDevice(self.open(address_of_edu()))

    def reaches(self, iova: int) -> bool:
        """Whether a device can write there; where it can, it writes four bytes."""
        return self.testdev.dma_write(iova).written

    def reached(self, count: int, base: int = BASE) -> set[int]:
        """Which of *count* pages from *base* on a device can write to."""
        return {page for page in range(count) if self.reaches(base + page * PAGE_SIZE)}


@contextmanager
def open_rig(way: Way) -> Iterator[Rig]:
    """
    Bind both devices, make the target.

    Everything is put back at the end, and no descriptor of VFIO or iommufd is left.
    """
    with ExitStack() as bindings:
        for address in (address_of_edu(), address_of_testdev()):
            bindings.enter_context(bind_to_vfio(address))
        with ExitStack() as stack:
            target = way.open_target()
            stack.callback(target.close)
            rig = Rig(way, target, stack)
            # Without a device there are no capabilities (type1), or not those that count (iommufd).
            _ = rig.testdev
            yield rig
    # Those of memory may be: a poisoned block keeps its own.
    left = [path for path in open_descriptors().values() if "vfio" in path or "iommu" in path]
    assert left == []


@contextmanager
def entry_limit(limit: int) -> Iterator[None]:
    """Have type1 containers that are opened meanwhile take so many mappings."""
    before = _ENTRY_LIMIT.read_text()
    _ENTRY_LIMIT.write_text(f"{limit}\n")
    try:
        yield
    finally:
        _ENTRY_LIMIT.write_text(before)


def wait_for_fault(log: FaultLog, provoke: Callable[[], object]) -> list[str]:
    """
    Provoke a fault until the kernel's log shows one: faults of earlier tests may have used up what
    it prints in five seconds.

    :return: The first lines that came; what had been in the log before is thrown away.
    """
    log.take()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        provoke()
        time.sleep(_POLL_SECONDS)
        if lines := log.take():
            return lines
        assert time.monotonic() < deadline, "the IOMMU's driver has reported no fault"


def host_range(fd: int | None, address: int, first: int = 0, count: int = 1) -> HostRange:
    """Name some pages of a backing."""
    offset = first * PAGE_SIZE
    return HostRange(fd, offset, address + offset, count * PAGE_SIZE)
