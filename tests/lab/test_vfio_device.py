"""
A real PCI device through VFIO: binding it, opening it in both ways, its regions, its DMA, and what
is refused.
"""

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab_devices import (
    BASE,
    BOUNCE,
    Rig,
    Way,
    address_of_edu,
    address_of_testdev,
    host_range,
    open_rig,
)
from ramblock import RamBlock
from ramblock.dma import IommufdIoas, Type1Container, VfioGroup
from ramblock.errors import BusyError, DmaError
from ramblock.units import MIB, PAGE_SIZE
from ramblock.vfio import (
    BouncePage,
    DmaResult,
    EduDevice,
    IommuTestdev,
    PciAddress,
    VfioDevice,
    bind_to_vfio,
    driver_of,
    find_devices,
    iommu_group,
)

# Three functions of one chip, in one group: the bridge to the south, a disk controller, an SMBus.
ICH9 = [PciAddress(0, 0, 0x1F, function) for function in (0, 2, 3)]
VIRTIO = (0x1AF4, 0x1003)


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@pytest.fixture
def block() -> Iterator[RamBlock]:
    with RamBlock.create("ram", MIB) as block:
        yield block


# -- binding ---------------------------------------------------------------------------------------


def override_of(address: PciAddress) -> str:
    return Path(f"/sys/bus/pci/devices/{address}/driver_override").read_text().strip()


def test_a_device_without_driver_is_bound_and_let_go() -> None:
    address = address_of_edu()
    assert driver_of(address) is None
    with bind_to_vfio(address):
        assert driver_of(address) == "vfio-pci"
        assert Path(f"/dev/vfio/{iommu_group(address)}").is_char_device()
    assert (driver_of(address), override_of(address)) == (None, "(null)")
    assert not Path(f"/dev/vfio/{iommu_group(address)}").exists()


def test_a_device_with_a_driver_gets_it_back() -> None:
    # One of the consoles that nobody listens to; they are all alike.
    address = find_devices(*VIRTIO)[-1]
    assert driver_of(address) == "virtio-pci"
    binding = bind_to_vfio(address)
    binding.__enter__()
    assert driver_of(address) == "vfio-pci"
    binding.__exit__(None, None, None)
    assert (driver_of(address), override_of(address)) == ("virtio-pci", "(null)")


def test_ctrl_c_meanwhile_puts_it_back_too() -> None:
    with pytest.raises(KeyboardInterrupt), bind_to_vfio(address_of_edu()):
        raise KeyboardInterrupt
    assert (driver_of(address_of_edu()), override_of(address_of_edu())) == (None, "(null)")


def test_a_device_that_is_open_is_not_unbound() -> None:
    with ExitStack() as stack:
        ioas = IommufdIoas()
        stack.callback(ioas.close)
        with pytest.raises(BusyError, match="still open"), bind_to_vfio(address_of_edu()):
            device = stack.enter_context(VfioDevice.open_by_cdev(address_of_edu(), ioas))
    assert device.closed
    with bind_to_vfio(address_of_edu()):
        pass  # it is bound, and stays so
    Path(f"/sys/bus/pci/devices/{address_of_edu()}/driver_override").write_text("\n")
    Path(f"/sys/bus/pci/devices/{address_of_edu()}/driver/unbind").write_text(str(address_of_edu()))


def test_an_unbound_device_is_refused_with_what_to_do() -> None:
    with pytest.raises(DmaError, match=r"\(no driver\) has no VFIO character device: bind it"):
        VfioDevice.open_by_cdev(address_of_edu(), IommufdIoas())
    with pytest.raises(
        DmaError, match="no device of the group is bound to a VFIO driver"
    ) as caught:
        VfioDevice.open_by_group(address_of_edu(), Type1Container())
    assert f"{address_of_edu()} (no driver)" in str(caught.value)


def test_a_group_of_several_devices() -> None:
    number = iommu_group(ICH9[0])
    assert [iommu_group(address) for address in ICH9] == [number] * len(ICH9)
    with bind_to_vfio(ICH9[-1]):
        # The others have no driver, which is fine.
        group = VfioGroup(number)
        assert group.viable
        container = Type1Container()
        container.add_group(group)
        group.open_device(str(ICH9[-1])).close()
        for other in (ICH9[0], address_of_edu()):
            with pytest.raises(
                DmaError, match="the device is not in this group with VFIO"
            ) as caught:
                group.open_device(str(other))
            assert caught.value.errno == errno.ENODEV
        container.close()


def test_a_group_is_opened_once() -> None:
    address = address_of_edu()
    with bind_to_vfio(address):
        first, second = Type1Container(), Type1Container()
        with VfioDevice.open_by_group(address, first):
            with pytest.raises(DmaError, match="the group is open already") as caught:
                VfioDevice.open_by_group(address, second)
            assert caught.value.errno == errno.EBUSY
            ioas = IommufdIoas()
            with pytest.raises(DmaError, match="VFIO_DEVICE_BIND_IOMMUFD") as caught:
                VfioDevice.open_by_cdev(address, ioas)
            assert caught.value.errno == errno.EBUSY
        first.close()
        # Now it is free.
        VfioDevice.open_by_cdev(address, ioas).close()
        for target in (second, ioas):
            target.close()


# -- regions ---------------------------------------------------------------------------------------


def test_regions(rig: Rig) -> None:
    device = rig.edu.device
    assert device.ids == (EduDevice.VENDOR, EduDevice.DEVICE)
    bar = device.region(0)
    assert (bar.size, bar.layout.mappable) == (MIB, ((0, MIB),))
    # Its identification, by read and through the mapping.
    assert bar.read(0, 4) == struct.pack("<I", 0x0100_00ED)
    mapped = device.map_region(0)
    assert mapped.read32(0) == 0x0100_00ED
    # Its liveness check: what is written comes back inverted.
    mapped.write32(4, 0x1234_5678)
    assert bar.read(4, 4) == struct.pack("<I", ~0x1234_5678 & 0xFFFF_FFFF)
    assert device.region(1).size == 0
    with pytest.raises(DmaError) as caught:
        device.region(99)
    assert caught.value.errno == errno.EINVAL
    assert device.config.size in (256, 4096)


def test_bus_mastering_is_what_lets_it_do_dma(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host_range(block.fd, block.address))
    with BouncePage(rig.target, BOUNCE) as bounce:
        rig.edu.write_to_ram(BASE, b"one", bounce)
        rig.edu.device.disable_bus_mastering()
        rig.edu.write_to_ram(BASE, b"two", bounce)
        assert block.read(0, 3) == b"one"
        rig.edu.device.enable_bus_mastering()
        rig.edu.write_to_ram(BASE, b"two", bounce)
        assert block.read(0, 3) == b"two"


def test_reset(rig: Rig) -> None:
    device = rig.edu.device
    mapped = device.map_region(0)
    mapped.write64(0x80, 0x1234_5000)
    if 1 & device.flags:  # VFIO_DEVICE_FLAGS_RESET
        device.reset()
        assert not device.bus_master
    else:
        # Conventional PCI without power management can only be reset with its bus, which it shares.
        with pytest.raises(ValueError, match="cannot be reset"):
            device.reset()


# -- DMA -------------------------------------------------------------------------------------------


def test_edu_copies_both_ways(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host_range(block.fd, block.address, 0, 4))
    data = bytes(range(256)) * 16
    with BouncePage(rig.target, BOUNCE) as bounce:
        rig.edu.write_to_ram(BASE + 2 * PAGE_SIZE, data, bounce)
        assert block.read(2 * PAGE_SIZE, PAGE_SIZE) == data
        block.write(PAGE_SIZE - 100, bytes(reversed(data))[:200])
        assert (
            rig.edu.read_from_ram(BASE + PAGE_SIZE - 100, 200, bounce)
            == bytes(reversed(data))[:200]
        )


def test_read_only_memory_is_read_and_not_written(rig: Rig, block: RamBlock) -> None:
    block.write(0, b"read me")
    rig.target.map(BASE, host_range(block.fd, block.address), writable=False)
    assert rig.testdev.dma_write(BASE) is DmaResult.REFUSED
    with BouncePage(rig.target, BOUNCE) as bounce:
        assert rig.edu.read_from_ram(BASE, 7, bounce) == b"read me"
    assert block.read(0, 7) == b"read me"


def test_anonymous_memory(rig: Rig) -> None:
    with BouncePage(rig.target, BASE) as page:
        assert rig.reaches(BASE)
        assert page.read(4) == IommuTestdev.pattern(4)
    assert not rig.reaches(BASE)


def test_a_longer_write_over_two_mappings(rig: Rig, block: RamBlock) -> None:
    for page in (0, 1):
        # Swapped, so that it is two mappings for the IOMMU as well.
        rig.target.map(BASE + page * PAGE_SIZE, host_range(block.fd, block.address, 1 - page))
    assert rig.testdev.dma_write(BASE + PAGE_SIZE - 6, 12).written
    pattern = IommuTestdev.pattern(12)
    assert block.read(2 * PAGE_SIZE - 6, 6) == pattern[:6]
    assert block.read(0, 6) == pattern[6:]


# -- lifetimes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_first", [False, True])
def test_either_may_be_closed_first(rig: Rig, block: RamBlock, *, target_first: bool) -> None:
    rig.target.map(BASE, host_range(block.fd, block.address))
    if target_first:
        rig.target.close()
        # The device is open and attached to an address space that has nothing in it.
        assert not rig.reaches(BASE)
        rig.testdev.device.close()
    else:
        rig.testdev.device.close()
        assert rig.target.unmap(BASE, PAGE_SIZE) == PAGE_SIZE
        rig.target.close()


def test_a_device_that_comes_back_finds_what_is_mapped(rig: Rig, block: RamBlock) -> None:
    rig.target.map(BASE, host_range(block.fd, block.address))
    rig.testdev.device.close()
    rig.target.map(BASE + PAGE_SIZE, host_range(block.fd, block.address, 1))
    again = IommuTestdev(rig.open(address_of_testdev()))
    assert [again.dma_write(BASE + page * PAGE_SIZE).written for page in range(3)] == [
        True,
        True,
        False,
    ]


def test_a_process_that_is_killed_leaves_nothing(block: RamBlock) -> None:
    child = os.fork()
    if child == 0:
        try:
            with open_rig(Way.CUTTING) as rig:
                rig.target.map(BASE, host_range(block.fd, block.address))
                os.kill(os.getpid(), 9)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    # Bound still: nobody could undo that. But free.
    for way in Way:
        with open_rig(way) as rig:
            assert not rig.reaches(BASE)
    for address in (address_of_edu(), address_of_testdev()):
        Path(f"/sys/bus/pci/devices/{address}/driver_override").write_text("\n")
        Path(f"/sys/bus/pci/devices/{address}/driver/unbind").write_text(str(address))


# -- no IOMMU --------------------------------------------------------------------------------------


@pytest.mark.lab_variant("no-iommu")
def test_without_an_iommu_it_is_said_what_is_missing() -> None:
    address = address_of_edu()
    with pytest.raises(DmaError, match="in no IOMMU group: switch the IOMMU on") as caught:
        iommu_group(address)
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(DmaError, match="vfio-pci did not take"), bind_to_vfio(address):
        pass
    assert (driver_of(address), override_of(address)) == (None, "(null)")
    with pytest.raises(DmaError, match="in no IOMMU group"):
        VfioDevice.open_by_group(address, Type1Container())
    with pytest.raises(DmaError, match="has no VFIO character device"):
        VfioDevice.open_by_cdev(address, IommufdIoas())
