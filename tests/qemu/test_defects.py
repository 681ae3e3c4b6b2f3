"""
What QEMU 11.1.3 does wrong, shown on the running binary, and our core's end of the same story.

A test here fails when a newer QEMU does it right: then the list in docs/qemu-without-snp.rst has to
change. DMA in this way of running is that of a vfio-user device; tests/lab/test_qemu_double.py
shows the same through the kernel's IOMMU.
"""

import errno
from collections.abc import Callable

import pytest

from lab.qemu_double import (
    KIB,
    MIB,
    Call,
    ConfidentialGuest,
    Double,
    GuestOptions,
    GuestStopped,
    VfioUserDevice,
)
from lab.qemu_double.log import joined
from message_samples import explained
from qemu_twin import Twin, TwinDevice
from ramblock import MappingPolicy, PageState
from ramblock.dma import DmaTarget, SoftIommu
from ramblock.errors import ConversionError, IommuFault, UsageError
from ramblock.testing import FaultyTarget

_SALT = 0x55 << 56
_ROM = 0xC0000
_NODES = (32 * MIB, 32 * MIB)
_BORDER = 32 * MIB


def _pages(start: int, size: int) -> set[int]:
    return set(range(start // 4096, (start + size) // 4096))


@pytest.fixture
def device(double: Double) -> VfioUserDevice:
    return double.vfio_user_device()


def _both(twin: Twin) -> list[TwinDevice]:
    return [twin.attach(policy) for policy in (MappingPolicy.PAGE, MappingPolicy.RUN)]


def test_reset_leaves_the_mappings_of_the_guest_before(
    double: Double, device: VfioUserDevice
) -> None:
    guest = double.guest(GuestOptions(resets=True), device)
    shared = _pages(2 * MIB, 64 * KIB)
    with Twin(guest) as twin:
        ours = _both(twin)
        guest.convert(2 * MIB, 64 * KIB, private=False)
        twin.convert(2 * MIB, 64 * KIB, private=False)
        guest.fill_pages(2 * MIB, 64 * KIB, _SALT)
        guest.log.skip()
        guest.reset()
        twin.reset()
        names = [line.name for line in guest.log.new()]

        # QEMU: a new VM, all of whose pages are private, and no unmap.
        assert "kvm_sev_init" in names
        assert not [name for name in names if name.startswith("vfio_user_dma")]
        assert device.pages() == shared
        assert device.read(2 * MIB) == 2 * MIB + _SALT  # what the guest before has written
        # The new guest asks for a page that QEMU believes to be shared: nothing is done.
        guest.convert(2 * MIB, 4 * KIB, private=False)
        assert joined(guest.log.new())[-1].endswith("from 'populated' to 'populated'")
        # Ours: nothing is mapped.
        assert [device.pages() for device in ours] == [set(), set()]
        with pytest.raises(IommuFault):
            ours[0].iommu.read(2 * MIB, 8)


def test_range_over_two_regions_changes_the_mappings_of_the_first_only(
    double: Double, device: VfioUserDevice
) -> None:
    guest = double.guest(GuestOptions(), device)
    rom = _pages(_ROM, 32 * KIB)
    with Twin(guest) as twin:
        ours = _both(twin)

        def convert(gpa: int, size: int, *, private: bool) -> None:
            assert guest.convert(gpa, size, private=private) == 0
            twin.convert(gpa, size, private=private)

        convert(_ROM, 32 * KIB, private=False)
        assert device.pages() == rom
        convert(_ROM - 32 * KIB, 64 * KIB, private=True)
        assert device.pages() == rom  # stale: QEMU has set its attribute to private
        assert [device.pages() for device in ours] == [set(), set()]

        guest.convert(_ROM, 32 * KIB, private=True)
        convert(_ROM - 32 * KIB, 64 * KIB, private=False)
        assert device.pages() == _pages(_ROM - 32 * KIB, 32 * KIB)  # the ROM's are missing
        assert [device.pages() for device in ours] == [_pages(_ROM - 32 * KIB, 64 * KIB)] * 2


@pytest.mark.parametrize("private", [False, True], ids=["to shared", "to private"])
def test_range_over_two_backends_stops_the_guest_after_the_attribute_was_set(
    double: Double, device: VfioUserDevice, *, private: bool
) -> None:
    guest = double.guest(GuestOptions(nodes=_NODES), device)
    with Twin(guest) as twin:
        ours = _both(twin)
        before = not private
        for gpa in (_BORDER - MIB, _BORDER):
            guest.convert(gpa, MIB, private=before)
            twin.convert(gpa, MIB, private=before)
        guest.log.skip()
        with pytest.raises(GuestStopped, match="internal-error"):
            guest.convert(_BORDER - MIB, 2 * MIB, private=private)

        assert "conversion-two-regions" in explained(guest.output())
        assert [line.name for line in guest.log.new()][-1] == "kvm_convert_memory"
        last = guest.shim_log.read_text().splitlines()[-1]
        assert last.endswith(f"-> {'0x8' if private else '0'}")
        twin.convert(_BORDER - MIB, 2 * MIB, private=private)
        expected = set() if private else _pages(_BORDER - MIB, 2 * MIB)
        assert [device.pages() for device in ours] == [expected, expected]


@pytest.mark.parametrize(
    ("gpa", "size", "private"),
    [
        (60 * MIB, 8 * MIB, False),
        (60 * MIB, 8 * MIB, True),
        (128 * MIB, 4 * KIB, True),
        (0xFEC0_0000, 4 * KIB, True),
    ],
    ids=["past the end to shared", "past the end to private", "a hole", "registers"],
)
def test_request_for_more_than_ram_stops_the_guest_for_good(
    double: Double, device: VfioUserDevice, gpa: int, size: int, *, private: bool
) -> None:
    guest = double.guest(GuestOptions(), device)
    with Twin(guest) as twin:
        ours = _both(twin)
        guest.convert(2 * MIB, 64 * KIB, private=False)
        twin.convert(2 * MIB, 64 * KIB, private=False)
        with pytest.raises(GuestStopped, match="internal-error"):
            guest.convert(gpa, size, private=private)
        assert guest.status == "internal-error"

        # Ours refuses it, and nothing has changed: the guest gets an error number.
        with pytest.raises(UsageError):
            twin.convert(gpa, size, private=private)
        assert [device.pages() for device in ours] == [_pages(2 * MIB, 64 * KIB)] * 2
        assert not twin.memory.poisoned


def _fail_fifth(iommu: SoftIommu) -> DmaTarget:
    return FaultyTarget(iommu, fail_map=[21])


def _refused(guest: ConfidentialGuest, refusing: VfioUserDevice, *before: tuple[int, int]) -> None:
    guest.convert(2 * MIB, 64 * KIB, private=False)
    for gpa, size in before:
        guest.convert(gpa, size, private=False)
    refusing.refuse_maps_after(4)
    with pytest.raises(GuestStopped, match="internal-error"):
        guest.convert(4 * MIB, 64 * KIB, private=False)


def test_refused_map_leaves_the_bitmap_populated(double: Double, device: VfioUserDevice) -> None:
    second = double.vfio_user_device()
    guest = double.guest(GuestOptions(root_ports=1), device)
    _refused(guest, device)
    with Twin(guest) as twin:
        ours = twin.attach(MappingPolicy.PAGE, _fail_fifth)
        twin.convert(2 * MIB, 64 * KIB, private=False)
        with pytest.raises(ConversionError) as caught:
            twin.convert(4 * MIB, 64 * KIB, private=False)

        # QEMU has undone the mappings, and still takes the pages for populated: a device that comes
        # gets them.
        assert device.pages() == _pages(2 * MIB, 64 * KIB)
        guest.plug(second, "second")
        assert second.pages() == _pages(2 * MIB, 64 * KIB) | _pages(4 * MIB, 64 * KIB)
        # Ours has undone everything, and a device that comes gets what is shared.
        assert caught.value.rolled_back
        later = twin.attach(MappingPolicy.RUN)
        assert ours.pages() == later.pages() == _pages(2 * MIB, 64 * KIB)
        assert twin.memory.state(4 * MIB) is PageState.PRIVATE


def test_refused_map_in_a_mixture_leaves_half_of_it(double: Double, device: VfioUserDevice) -> None:
    guest = double.guest(GuestOptions(), device)
    mixed = (4 * MIB + 8 * KIB, 4 * KIB)
    _refused(guest, device, mixed)
    with Twin(guest) as twin:
        ours = twin.attach(MappingPolicy.PAGE, lambda iommu: FaultyTarget(iommu, fail_map=[22]))
        twin.convert(2 * MIB, 64 * KIB, private=False)
        twin.convert(*mixed, private=False)
        with pytest.raises(ConversionError):
            twin.convert(4 * MIB, 64 * KIB, private=False)

        assert device.pages() == _pages(2 * MIB, 64 * KIB) | _pages(4 * MIB, 20 * KIB)
        assert ours.pages() == _pages(2 * MIB, 64 * KIB) | _pages(*mixed)


@pytest.mark.parametrize("position", [0, 1], ids=["the first refuses", "the second refuses"])
def test_refused_map_of_one_of_two_devices(double: Double, position: int) -> None:
    devices = [double.vfio_user_device() for _ in range(2)]
    guest = double.guest(GuestOptions(), *devices)
    _refused(guest, devices[position])
    with Twin(guest) as twin:
        around: list[Callable[[SoftIommu], DmaTarget]] = [lambda iommu: iommu] * 2
        around[position] = _fail_fifth
        ours = [twin.attach(MappingPolicy.PAGE, each) for each in around]
        twin.convert(2 * MIB, 64 * KIB, private=False)
        with pytest.raises(ConversionError) as caught:
            twin.convert(4 * MIB, 64 * KIB, private=False)

        assert [device.pages() for device in devices] == [_pages(2 * MIB, 64 * KIB)] * 2
        assert caught.value.rolled_back
        assert [device.pages() for device in ours] == [_pages(2 * MIB, 64 * KIB)] * 2


def test_stopped_guest_cannot_go_on(double: Double) -> None:
    guest = double.guest(GuestOptions())
    with pytest.raises(GuestStopped):
        guest.convert(128 * MIB, 4 * KIB, private=True)

    with pytest.raises(Exception, match="Resetting the Virtual Machine is required"):
        guest.qmp.execute("cont")
    assert guest.end() == 0


def test_failed_free_of_the_shared_side_stops_the_guest(
    double: Double, device: VfioUserDevice
) -> None:
    # The conversion itself is done by then. Ours counts the bytes (not_freed_bytes) and answers the
    # guest that it is done.
    guest = double.guest(GuestOptions(), device)
    guest.convert(2 * MIB, 64 * KIB, private=False)
    guest.faults.arm(Call.PUNCH, error=errno.EIO)
    with pytest.raises(GuestStopped, match="internal-error"):
        guest.convert(2 * MIB, 64 * KIB, private=True)

    assert device.pages() == set()
    assert guest.faults.tally(Call.PUNCH).failed == 1
