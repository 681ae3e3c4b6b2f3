"""Devices of QEMU's confidential guests: two of them, one that comes later, one that goes; DMA."""

import pytest

from lab.qemu_double import KIB, MIB, Double, GuestOptions
from lab.qemu_double.log import joined
from qemu_twin import Twin
from ramblock import MappingPolicy
from ramblock.errors import IommuFault

_SALT = 0x55 << 56


def _pages(start: int, size: int) -> set[int]:
    return set(range(start // 4096, (start + size) // 4096))


def test_device_reads_what_the_guest_wrote_to_shared_pages_and_nothing_else(
    double: Double,
) -> None:
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(), device)
    guest.convert(2 * MIB, 64 * KIB, private=False)
    guest.fill_pages(2 * MIB, 64 * KIB, _SALT)

    assert device.pages() == _pages(2 * MIB, 64 * KIB)
    for page in device.pages():
        assert device.read(page * 4096) == page * 4096 + _SALT
    with pytest.raises(IommuFault):
        device.read(2 * MIB + 64 * KIB)
    guest.convert(2 * MIB, 32 * KIB, private=True)
    assert device.pages() == _pages(2 * MIB + 32 * KIB, 32 * KIB)
    assert not device.reaches(2 * MIB)
    # Its shared side is freed.
    assert guest.count_zero(2 * MIB, 32 * KIB) == 8


def test_newest_device_hears_of_a_conversion_first(double: Double) -> None:
    devices = [double.vfio_user_device() for _ in range(2)]
    guest = double.guest(GuestOptions(), *devices)
    devices[0].refuse_maps_after(0)
    guest.log.skip()

    with pytest.raises(Exception, match="internal-error"):
        guest.convert(2 * MIB, 64 * KIB, private=False)
    steps = [step for step in joined(guest.log.new()) if step.startswith("vfio_user_dma_map")]

    # All maps of the newest device, then the first of the oldest, which was refused.
    assert steps == [
        "vfio_user_dma_map [0x200000, 0x210000) in 16 calls",
        "vfio_user_dma_map [0x200000, 0x201000) in 1 calls",
    ]


def test_device_that_comes_later_gets_the_populated_runs_page_by_page(double: Double) -> None:
    first, second = double.vfio_user_device(), double.vfio_user_device()
    guest = double.guest(GuestOptions(root_ports=1), first)
    with Twin(guest) as twin:
        for gpa, size, private in (
            (2 * MIB, 64 * KIB, False),
            (4 * MIB, 2 * MIB, False),
            (4 * MIB + 64 * KIB, 64 * KIB, True),
        ):
            guest.convert(gpa, size, private=private)
            twin.convert(gpa, size, private=private)
        guest.log.skip()
        guest.plug(second, "second")
        steps = joined(guest.log.new())
        ours = twin.attach(MappingPolicy.PAGE)

        assert [step for step in steps if step.startswith("vfio_user_dma_map")] == [
            "vfio_user_dma_map [0x200000, 0x210000) in 16 calls",
            "vfio_user_dma_map [0x400000, 0x410000) in 16 calls",
            "vfio_user_dma_map [0x420000, 0x600000) in 480 calls",
        ]
        assert second.pages() == first.pages() == ours.pages()
        assert ours.target.calls == [("map", page * 4096, 4096) for page in sorted(second.pages())]
        guest.convert(2 * MIB, 4 * KIB, private=True)
        assert second.pages() == first.pages() == ours.pages() - {512}


def test_device_that_goes_loses_everything_and_the_other_nothing(double: Double) -> None:
    first, second = double.vfio_user_device(), double.vfio_user_device()
    guest = double.guest(GuestOptions(root_ports=1), first)
    guest.convert(2 * MIB, 64 * KIB, private=False)
    guest.plug(second, "second")
    assert second.pages() == _pages(2 * MIB, 64 * KIB)
    guest.log.skip()
    guest.unplug("second")
    steps = joined(guest.log.new())

    assert [step for step in steps if step.startswith("vfio_user_dma_unmap")] == [
        "vfio_user_dma_unmap [0x0, 0xc0000) in 1 calls",
        "vfio_user_dma_unmap [0xc0000, 0xe0000) in 1 calls",
        "vfio_user_dma_unmap [0xe0000, 0x4000000) in 1 calls",
        "vfio_user_dma_unmap [0xffff0000, 0x100000000) in 1 calls",
    ]
    second.probe.wait_for(lambda: second.probe.client is None)
    assert first.pages() == _pages(2 * MIB, 64 * KIB)
    guest.convert(4 * MIB, 4 * KIB, private=False)
    assert first.pages() == _pages(2 * MIB, 64 * KIB) | {1024}


def test_guest_with_several_processors_starts(double: Double) -> None:
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(processors=2), device)

    assert guest.convert(2 * MIB, 4 * KIB, private=False) == 0
    assert device.pages() == {512}
