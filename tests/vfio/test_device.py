import errno
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from descriptors import open_descriptors
from fake_vfio import BAR_SIZE, FakeKernel, make_device
from ramblock.dma import IommufdIoas, SoftIommu, Type1Container
from ramblock.errors import DmaError, IommuFault, UsageError
from ramblock.testing import FaultyTarget
from ramblock.uapi import ioctl
from ramblock.vfio import (
    BouncePage,
    DmaResult,
    EduDevice,
    IommuTestdev,
    PciAddress,
    TransferTally,
    VfioDevice,
    edu,
)

ADDRESS = PciAddress(0, 0, 3, 0)


class Host:
    """A machine with one device that is bound to vfio-pci, in group 7."""

    def __init__(self, root: Path, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.sysfs, self.dev = root / "sys", root / "dev"
        folder = self.sysfs / "bus/pci/devices" / str(ADDRESS)
        (folder / "vfio-dev/vfio3").mkdir(parents=True)
        (folder / "iommu_group").symlink_to("../../../kernel/iommu_groups/7")
        (folder / "driver").symlink_to("../../drivers/vfio-pci")
        (self.dev / "vfio/devices").mkdir(parents=True)
        (self.dev / "vfio/7").symlink_to("/dev/null")
        self.be(0x1234, 0x5678)

    def be(self, vendor: int, device: int) -> None:
        self.kernel.device_file = make_device(self.dev / "vfio/devices/vfio3", vendor, device)

    def container(self) -> Type1Container:
        return Type1Container(path="/dev/null")

    def ioas(self) -> IommufdIoas:
        return IommufdIoas(cutting=False, path="/dev/null")

    def by_group(self, container: Type1Container) -> VfioDevice:
        return VfioDevice.open_by_group(ADDRESS, container, sysfs=self.sysfs, dev=self.dev)

    def by_cdev(self, ioas: IommufdIoas) -> VfioDevice:
        return VfioDevice.open_by_cdev(ADDRESS, ioas, sysfs=self.sysfs, dev=self.dev)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    kernel = FakeKernel()
    monkeypatch.setattr(ioctl, "call", kernel.call)
    return Host(tmp_path, kernel)


@pytest.fixture
def device(host: Host) -> Iterator[VfioDevice]:
    with host.by_cdev(host.ioas()) as device:
        yield device


# -- opening and closing ---------------------------------------------------------------------------


def test_by_group(host: Host) -> None:
    container = host.container()
    with host.by_group(container) as device:
        assert device.target is container
        assert container.group(7) is not None
        assert (device.region_count, device.closed) == (9, False)
        # The kernel lets a group be opened once; a second device of it finds it in the container.
        with host.by_group(container):
            assert host.kernel.calls.count("VFIO_GROUP_SET_CONTAINER") == 1
    assert "closed" in repr(device)
    container.close()


def test_by_cdev(host: Host) -> None:
    ioas = host.ioas()
    with host.by_cdev(ioas) as device:
        assert host.kernel.attached == ioas.ioas_id
        device.detach()
        assert host.kernel.attached is None
        device.attach()
        assert host.kernel.attached == ioas.ioas_id
        with pytest.raises(DmaError) as caught:
            device.attach()
        assert caught.value.errno == errno.EBUSY


def test_addresses_are_asked_for_again_when_a_device_comes_or_goes(host: Host) -> None:
    calls = host.kernel.calls
    device = host.by_cdev(host.ioas())
    assert calls[-1] == "IOMMU_IOAS_IOVA_RANGES"
    for change in (device.detach, device.attach):
        calls.clear()
        change()
        assert calls[-1] == "IOMMU_IOAS_IOVA_RANGES"
    device.close()


def test_a_device_that_is_forgotten_is_closed(host: Host) -> None:
    ioas = host.ioas()
    before = open_descriptors()
    device = host.by_cdev(ioas)
    assert open_descriptors() != before
    del device
    assert open_descriptors() == before


def test_a_group_is_attached_as_long_as_its_device_is_open(host: Host) -> None:
    with host.by_group(host.container()) as device:
        for call in (device.attach, device.detach):
            with pytest.raises(UsageError, match="opened by its group"):
                call()


@pytest.mark.parametrize("target_first", [False, True])
@pytest.mark.parametrize("way", ["group", "cdev"])
def test_closed_in_any_order_and_twice(host: Host, way: str, target_first: bool) -> None:
    before = open_descriptors()
    if way == "group":
        container = host.container()
        device, close_target = host.by_group(container), container.close
    else:
        ioas = host.ioas()
        device, close_target = host.by_cdev(ioas), ioas.close
    device.map_region(0)
    closes: list[Callable[[], None]] = [close_target, device.close]
    for close in closes if target_first else reversed(closes):
        close()
        close()
    assert open_descriptors() == before
    with pytest.raises(DmaError, match="it was closed"):
        device.region(7)


@pytest.mark.parametrize("way", ["group", "cdev"])
def test_whatever_call_fails_nothing_is_held(host: Host, way: str) -> None:
    before = open_descriptors()

    def open_and_close() -> None:
        if way == "group":
            container = host.container()
            try:
                host.by_group(container).close()
            finally:
                container.close()
        else:
            ioas = host.ioas()
            try:
                host.by_cdev(ioas).close()
            finally:
                ioas.close()

    open_and_close()
    for number in range(1, len(host.kernel.calls) + 1):
        host.kernel.calls.clear()
        host.kernel.attached = None
        host.kernel.fail_at = number
        with pytest.raises(DmaError):
            open_and_close()
        assert open_descriptors() == before, host.kernel.calls


def test_a_group_that_nobody_bound(host: Host) -> None:
    (host.dev / "vfio/7").unlink()
    container = host.container()
    with pytest.raises(
        DmaError, match="no device of the group is bound to a VFIO driver"
    ) as caught:
        host.by_group(container)
    assert caught.value.errno == errno.ENOENT
    assert container.group(7) is None


# -- regions ---------------------------------------------------------------------------------------


def test_reading_and_writing(device: VfioDevice) -> None:
    region = device.region(0)
    region.write(0x100, b"hello")
    assert region.read(0xFF, 7) == b"\0hello\0"
    assert region.size == BAR_SIZE
    assert device.region(0) is region


@pytest.mark.parametrize(("offset", "size"), [(BAR_SIZE, 1), (BAR_SIZE - 1, 2), (-1, 1), (0, 0)])
def test_outside_a_region_nothing_is_read(device: VfioDevice, offset: int, size: int) -> None:
    # Behind it lies another region.
    with pytest.raises(UsageError, match="region 0"):
        device.region(0).read(offset, size)
    with pytest.raises(UsageError):
        device.region(0).write(offset, bytes(size))


def test_a_region_that_does_not_exist(device: VfioDevice) -> None:
    with pytest.raises(DmaError) as caught:
        device.region(9)
    assert caught.value.errno == errno.EINVAL
    assert device.region(1).size == 0


def test_a_region_of_which_less_answers_than_there_is(host: Host, device: VfioDevice) -> None:
    region = device.region(7)
    with host.kernel.device_file.open("r+b") as file:
        file.truncate(BAR_SIZE + 2)
    with pytest.raises(OSError, match=r"2 bytes of \[0x0, 0x4\) read"):
        region.read(0, 4)


def test_mapped_registers(device: VfioDevice) -> None:
    mapped = device.map_region(0)
    mapped.write32(4, 0x1122_3344)
    mapped.write64(8, 0x5566_7788_99AA_BBCC)
    assert device.region(0).read(0, 16) == struct.pack(
        "<IIQ", 0, 0x1122_3344, 0x5566_7788_99AA_BBCC
    )
    assert (mapped.read32(4), mapped.read64(8)) == (0x1122_3344, 0x5566_7788_99AA_BBCC)
    assert mapped.words[1] == 0x1122_3344
    mapped.close()
    mapped.close()
    with pytest.raises(ValueError, match="released"):
        mapped.read32(0)


def test_a_region_that_cannot_be_mapped(device: VfioDevice) -> None:
    for index in (1, 2):
        with pytest.raises(UsageError, match="cannot be mapped as a whole"):
            device.map_region(index)


# -- config space ----------------------------------------------------------------------------------


def test_bus_mastering(device: VfioDevice) -> None:
    assert device.ids == (0x1234, 0x5678)
    device.config.write(4, struct.pack("<H", 0x0400))
    assert not device.bus_master
    device.enable_bus_mastering()
    assert device.bus_master
    # Memory accesses too; the rest stays.
    assert device.config.read(4, 2) == struct.pack("<H", 0x0406)
    device.disable_bus_mastering()
    assert device.config.read(4, 2) == struct.pack("<H", 0x0402)


def test_reset(host: Host, device: VfioDevice) -> None:
    device.reset()
    assert host.kernel.calls[-1] == "VFIO_DEVICE_RESET"
    host.kernel.device_flags = 2
    with (
        host.by_group(host.container()) as other,
        pytest.raises(UsageError, match="cannot be reset"),
    ):
        other.reset()


# -- the test devices, as far as they go without one -----------------------------------------------


def test_a_driver_wants_its_device(device: VfioDevice) -> None:
    for driver in (EduDevice, IommuTestdev):
        with pytest.raises(UsageError, match="is not an"):
            driver(device)


def test_edu_checks_what_qemu_does_not(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.be(EduDevice.VENDOR, EduDevice.DEVICE)
    with host.by_cdev(host.ioas()) as device:
        driver = EduDevice(device)
        assert device.bus_master
        for size in (0, -1, 4097):
            with pytest.raises(UsageError):
                driver.load(0x1000, size)
        monkeypatch.setattr(edu, "_TIMEOUT_SECONDS", 0)
        with pytest.raises(DmaError, match="did not finish a transfer of 16 bytes"):
            driver.store(0x1_0000_1000, 16)
        assert device.region(0).read(0x80, 32) == struct.pack(
            "<QQQQ", 0x40000, 0x1_0000_1000, 16, 3
        )


def test_iommu_testdev_is_told_what_to_do(host: Host) -> None:
    host.be(IommuTestdev.VENDOR, IommuTestdev.DEVICE)
    with host.by_cdev(host.ioas()) as device:
        driver = IommuTestdev(device)
        registers = device.map_region(0)
        registers.write32(0x10, DmaResult.REFUSED)
        assert driver.dma_write(0x1_2345_6000, 8) is DmaResult.REFUSED
        assert device.region(0).read(4, 12) == struct.pack("<III", 0x2345_6000, 1, 8)
        assert registers.read32(0x14) == 1
        for length in (0, -4, (1 << 20) + 1):
            with pytest.raises(UsageError):
                driver.dma_write(0, length)


def test_which_results_mean_that_memory_was_written() -> None:
    # The read-back goes to a physical address that was never told, so that its outcome says
    # nothing.
    written = {result for result in DmaResult if result.written}
    assert written == {DmaResult.OK, DmaResult.READ_BACK_FAILED, DmaResult.MISMATCH}


class SetAfter(Event):
    """Set when it has been asked a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_loop_counts(host: Host) -> None:
    host.be(IommuTestdev.VENDOR, IommuTestdev.DEVICE)
    with host.by_cdev(host.ioas()) as device:
        driver, registers = IommuTestdev(device), device.map_region(0)
        tally = driver.write_until(SetAfter(3), 0x1000)
        assert tally == TransferTally(transfers=192, refusals=0)
        registers.write32(0x10, DmaResult.REFUSED)
        assert driver.write_until(SetAfter(2), 0x1000, tally=tally) is tally
        assert tally == TransferTally(transfers=192, refusals=128)
        assert driver.write_until(SetAfter(0), 0x1000) == TransferTally()


def test_what_the_pattern_is() -> None:
    assert IommuTestdev.pattern(6) == b"\x78\x56\x34\x12\x78\x56"


# -- a page for handing data over ------------------------------------------------------------------


def test_a_bounce_page() -> None:
    iommu = SoftIommu()
    with BouncePage(iommu, 0x5000) as page:
        page.write(b"abc")
        assert iommu.read(0x5000, 4) == b"abc\0"
        iommu.write(0x5000, b"xyz!")
        assert page.read(3) == b"xyz"
    with pytest.raises(IommuFault):
        iommu.read(0x5000, 1)
    page.close()


def test_a_bounce_page_that_cannot_be_mapped_or_unmapped() -> None:
    with pytest.raises(DmaError):
        BouncePage(FaultyTarget(SoftIommu(), fail_map={1}), 0x5000)
    target = FaultyTarget(SoftIommu(), fail_unmap={1})
    page = BouncePage(target, 0x5000)
    with pytest.raises(DmaError):
        page.close()
    page.write(b"still there")
    page.close()
    with pytest.raises(ValueError, match="closed"):
        page.read(1)
