import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.descriptor import Descriptor
from ramblock.errors import BusyError, DmaError, UsageError
from ramblock.vfio import PciAddress, bind_to_vfio, driver_of, find_devices, iommu_group
from ramblock.vfio.pci import note_open, vfio_cdev

EDU = PciAddress(0, 0, 3, 0)
DISK = PciAddress(0, 0, 0x1F, 2)
ABSENT = PciAddress(0, 0xFF, 0x1F, 7)


# -- addresses -------------------------------------------------------------------------------------


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7))
def test_addresses_are_read_as_they_are_written(
    domain: int, bus: int, device: int, function: int
) -> None:
    address = PciAddress(domain, bus, device, function)
    assert PciAddress.parse(str(address)) == address
    assert PciAddress.parse(str(address).upper()) == address


def test_domain_0_may_be_left_out() -> None:
    assert PciAddress.parse("00:1f.2") == DISK
    assert str(DISK) == "0000:00:1f.2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0000:00:20.0",
        "0000:00:1f.8",
        "0:00:1f.2",
        "0000:00:1f",
        "00:1f.2x",
        "0000:00:1f.2/..",
        "\N{ARABIC-INDIC DIGIT ZERO}0:1f.2",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"0000:00:03\.0|is not a PCI address"):
        PciAddress.parse(text)


# -- a bus -----------------------------------------------------------------------------------------


class FakeBus:
    """
    A sysfs in which writing to a file does what the kernel does (drivers/base/bus.c, dd.c).

    :ivar writes: What was written, as (file, text).
    :ivar interrupt_at: 1-based number of the write at which Ctrl-C comes, before it does anything.
    :ivar refuse_at: 1-based number of the write that is EIO.
    """

    def __init__(self, sysfs: Path) -> None:
        self.sysfs = sysfs
        self.writes: list[tuple[str, str]] = []
        self.interrupt_at: int | None = None
        self.refuse_at: int | None = None
        self.vfio_takes = True
        for driver in ("vfio-pci", "ahci"):
            (sysfs / "bus/pci/drivers" / driver).mkdir(parents=True)

    def add(
        self, address: PciAddress, ids: tuple[int, int], group: int | None, driver: str | None
    ) -> None:
        folder = self.sysfs / "bus/pci/devices" / str(address)
        folder.mkdir(parents=True)
        for name, number in zip(("vendor", "device"), ids, strict=True):
            (folder / name).write_text(f"{number:#06x}\n")
        (folder / "driver_override").write_text("(null)\n")
        if group is not None:
            (folder / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{group}")
        if driver is not None:
            self._bind(folder, driver)

    def state(self, address: PciAddress) -> tuple[str | None, str]:
        folder = self.sysfs / "bus/pci/devices" / str(address)
        return driver_of(address, sysfs=self.sysfs), (
            folder / "driver_override"
        ).read_text().strip()

    def _bind(self, folder: Path, driver: str) -> None:
        (folder / "driver").symlink_to(self.sysfs / "bus/pci/drivers" / driver)

    def write(self, path: Path, text: str, *, unpatched: Callable[[Path, str], int]) -> int:
        name = str(path.relative_to(self.sysfs))
        self.writes.append((name, text))
        if len(self.writes) == self.interrupt_at:
            raise KeyboardInterrupt
        if len(self.writes) == self.refuse_at:
            raise OSError(errno.EIO, "Input/output error")
        text = text.strip()
        devices = self.sysfs / "bus/pci/devices"
        if path.name == "driver_override":
            unpatched(path, f"{text or '(null)'}\n")
        elif path.name == "unbind":
            (devices / text / "driver").unlink()
        elif path.name == "drivers_probe":
            override = (devices / text / "driver_override").read_text().strip()
            if override != "(null)" and self.vfio_takes:
                self._bind(devices / text, override)
        elif path.name == "bind":
            self._bind(devices / text, path.parent.name)
        return len(text)


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBus]:
    bus = FakeBus(tmp_path)
    bus.add(EDU, (0x1234, 0x11E8), 9, None)
    bus.add(DISK, (0x8086, 0x2922), None, "ahci")
    unpatched = Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "write_text", lambda path, text: bus.write(path, text, unpatched=unpatched)
        )
        yield bus


def test_looking_around(bus: FakeBus) -> None:
    assert find_devices(0x1234, 0x11E8, sysfs=bus.sysfs) == [EDU]
    assert find_devices(0x1234, 0x11E9, sysfs=bus.sysfs) == []
    assert driver_of(EDU, sysfs=bus.sysfs) is None
    assert driver_of(DISK, sysfs=bus.sysfs) == "ahci"
    assert iommu_group(EDU, sysfs=bus.sysfs) == 9


def test_no_iommu_is_said_so(bus: FakeBus) -> None:
    with pytest.raises(DmaError, match="in no IOMMU group: switch the IOMMU on") as caught:
        iommu_group(DISK, sysfs=bus.sysfs)
    assert caught.value.errno == errno.ENODEV


def test_a_device_that_is_not_there(bus: FakeBus) -> None:
    for call in (driver_of, iommu_group, vfio_cdev):
        with pytest.raises(DmaError, match=r"no PCI device 0000:ff:1f\.7"):
            call(ABSENT, sysfs=bus.sysfs)
    with pytest.raises(DmaError, match="no PCI device"), bind_to_vfio(ABSENT, sysfs=bus.sysfs):
        pass


def test_the_character_device(bus: FakeBus) -> None:
    with pytest.raises(
        DmaError, match=r"0000:00:1f\.2 \(ahci\) has no VFIO character device: bind it"
    ):
        vfio_cdev(DISK, sysfs=bus.sysfs)
    (bus.sysfs / "bus/pci/devices" / str(EDU) / "vfio-dev/vfio5").mkdir(parents=True)
    assert vfio_cdev(EDU, sysfs=bus.sysfs, dev=Path("/d")) == Path("/d/vfio/devices/vfio5")


# -- binding and its undo --------------------------------------------------------------------------


@pytest.mark.parametrize("address", [EDU, DISK])
@pytest.mark.parametrize("override", ["(null)", "something"])
def test_bound_for_a_while(bus: FakeBus, address: PciAddress, override: str) -> None:
    file = bus.sysfs / "bus/pci/devices" / str(address) / "driver_override"
    with file.open("w") as stream:
        stream.write(override)
    before = bus.state(address)
    with bind_to_vfio(address, sysfs=bus.sysfs) as bound:
        assert bound == address
        assert bus.state(address) == ("vfio-pci", "vfio-pci")
    assert bus.state(address) == before


def test_what_is_bound_already_stays_so(bus: FakeBus) -> None:
    with bind_to_vfio(EDU, sysfs=bus.sysfs):
        bus.writes.clear()
        with bind_to_vfio(EDU, sysfs=bus.sysfs):
            assert driver_of(EDU, sysfs=bus.sysfs) == "vfio-pci"
        assert bus.writes == []
        assert driver_of(EDU, sysfs=bus.sysfs) == "vfio-pci"


# A device that has a driver is unbound first.
@pytest.mark.parametrize(
    ("address", "number"), [(EDU, 1), (EDU, 2), (DISK, 1), (DISK, 2), (DISK, 3)]
)
@pytest.mark.parametrize(
    ("kind", "expected"), [("interrupt_at", KeyboardInterrupt), ("refuse_at", DmaError)]
)
def test_a_failure_half_way_is_put_back(
    bus: FakeBus, address: PciAddress, number: int, kind: str, expected: type[BaseException]
) -> None:
    before = bus.state(address)
    setattr(bus, kind, number)
    with pytest.raises(expected), bind_to_vfio(address, sysfs=bus.sysfs):
        pytest.fail("the body was reached")
    assert bus.state(address) == before


@pytest.mark.parametrize("address", [EDU, DISK])
def test_ctrl_c_in_the_body_is_put_back(bus: FakeBus, address: PciAddress) -> None:
    before = bus.state(address)
    with pytest.raises(KeyboardInterrupt), bind_to_vfio(address, sysfs=bus.sysfs):
        raise KeyboardInterrupt
    assert bus.state(address) == before


@pytest.mark.parametrize("number", [4, 5, 6])
def test_an_interrupt_in_the_undo_lets_it_finish(bus: FakeBus, number: int) -> None:
    before = bus.state(DISK)
    bus.interrupt_at = number
    with pytest.raises(KeyboardInterrupt), bind_to_vfio(DISK, sysfs=bus.sysfs):
        assert len(bus.writes) == 3
    assert bus.state(DISK) == before


def test_the_undo_says_what_it_could_not_write(bus: FakeBus) -> None:
    bus.refuse_at = 5
    expected = r"writing '0000:00:1f\.2' to .*unbind: Input/output error"
    with pytest.raises(DmaError, match=expected), bind_to_vfio(DISK, sysfs=bus.sysfs):
        pass


def test_a_driver_that_does_not_take_it(bus: FakeBus) -> None:
    bus.vfio_takes = False
    expected = r"vfio-pci did not take 0000:00:1f\.2, which has no driver now"
    with pytest.raises(DmaError, match=expected), bind_to_vfio(DISK, sysfs=bus.sysfs):
        pass
    assert bus.state(DISK) == ("ahci", "(null)")


def test_a_driver_that_is_not_loaded(bus: FakeBus) -> None:
    binding = bind_to_vfio(EDU, driver="mlx5-vfio-pci", sysfs=bus.sysfs)
    with pytest.raises(DmaError, match="modprobe mlx5-vfio-pci"), binding:
        pass
    assert bus.writes == []


def test_a_device_that_is_open_is_not_unbound(bus: FakeBus) -> None:
    # The kernel would wait for it to be closed, by the one who waits.
    descriptor = Descriptor.open("/dev/null", "VFIO device")
    with pytest.raises(BusyError, match="still open"), bind_to_vfio(EDU, sysfs=bus.sysfs):
        note_open(EDU, descriptor)
    assert driver_of(EDU, sysfs=bus.sysfs) == "vfio-pci"
    descriptor.close()
    with bind_to_vfio(DISK, sysfs=bus.sysfs):
        note_open(DISK, descriptor)
        note_open(DISK, Descriptor.open("/dev/null", "forgotten at once"))
    assert bus.state(DISK) == ("ahci", "(null)")
