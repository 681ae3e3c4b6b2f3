"""
The drivers of QEMU's test devices, where the device does nothing: what is not known to have
happened is not reported.
"""

from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace

import pytest

from ramblock.dma import SoftIommu
from ramblock.errors import DmaError, UsageError
from ramblock.run import hardware
from ramblock.vfio import BouncePage, EduDevice, IommuTestdev

BOUNCE = 1 << 32


class AllAlike:
    """Words that keep nothing and read as one value."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __getitem__(self, index: int) -> int:
        return self._value

    def __setitem__(self, index: int, value: int) -> None:
        pass


class SilentRegisters:
    """Every register reads as a device that is switched off: all ones, or for edu: done."""

    def __init__(self, value: int) -> None:
        self.words = AllAlike(value & 0xFFFF_FFFF)
        self._value = value

    def read32(self, offset: int) -> int:
        return self._value & 0xFFFF_FFFF

    def read64(self, offset: int) -> int:
        return self._value

    def write32(self, offset: int, value: int) -> None:
        pass

    def write64(self, offset: int, value: int) -> None:
        pass


def silent(ids: tuple[int, int], value: int) -> SimpleNamespace:
    """Make a device that is opened and answers *value* everywhere."""
    registers = SilentRegisters(value)
    return SimpleNamespace(
        ids=ids, enable_bus_mastering=lambda: None, map_region=lambda index: registers
    )


@pytest.fixture
def bounce() -> Iterator[BouncePage]:
    with BouncePage(SoftIommu(), BOUNCE) as page:
        yield page


def test_edu_that_transfers_nothing_reads_zeros(bounce: BouncePage) -> None:
    edu = EduDevice(silent((EduDevice.VENDOR, EduDevice.DEVICE), 0))  # type: ignore[arg-type]
    edu.write_to_ram(1 << 20, b"secret", bounce)
    assert edu.read_from_ram(1 << 20, 6, bounce) == bytes(6)


def test_edu_that_does_not_reach_its_page_is_refused(bounce: BouncePage) -> None:
    with pytest.raises(UsageError, match="does not reach 0x100000000: its DMA mask is too small"):
        hardware.EduEngine(silent((EduDevice.VENDOR, EduDevice.DEVICE), 0), bounce)  # type: ignore[arg-type]


def test_testdev_that_is_switched_off_has_neither_written_nor_been_refused() -> None:
    device = silent((IommuTestdev.VENDOR, IommuTestdev.DEVICE), 0xFFFF_FFFF)
    engine = hardware.TestdevEngine(device)  # type: ignore[arg-type]
    with pytest.raises(DmaError, match="neither wrote 0x100000 nor was refused: IDLE"):
        engine.write(1 << 20, b"1234")
    with pytest.raises(DmaError, match="answers 0xffffffff: it does no DMA any more"):
        IommuTestdev(device).write_until(Event(), 1 << 20)  # type: ignore[arg-type]
