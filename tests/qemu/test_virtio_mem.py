"""virtio-mem in QEMU's confidential guests: plugged, shared and mapped are three things."""

from lab.qemu_double import KIB, MIB, Answer, Double, GuestOptions, VirtioMemDriver
from lab.qemu_double.log import joined
from qemu_twin import Twin
from ramblock import MappingPolicy

_QUEUE = 3 * MIB
_BLOCK = 2 * MIB


def test_page_is_mapped_when_it_is_plugged_and_shared(double: Double) -> None:
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(virtio_mem=32 * MIB), device)
    driver = VirtioMemDriver(guest, _QUEUE)
    base = driver.config().address
    driver.request_size(16 * MIB)
    with Twin(guest) as twin:
        virtio_mem = twin.virtio_mem
        assert virtio_mem is not None
        twin.convert(_QUEUE, 4 * KIB, private=False)
        ours = twin.attach(MappingPolicy.PAGE)
        assert device.pages() == ours.pages()

        def convert(offset: int, size: int, *, private: bool) -> None:
            assert guest.convert(base + offset, size, private=private) == 0
            twin.convert(base + offset, size, private=private)
            assert device.pages() == ours.pages()

        def plug(offset: int, blocks: int) -> None:
            assert driver.plug(base + offset, blocks) is Answer.ACK
            virtio_mem.plug(offset, blocks * _BLOCK)
            assert device.pages() == ours.pages()

        def unplug(offset: int, blocks: int) -> None:
            assert driver.unplug(base + offset, blocks) is Answer.ACK
            virtio_mem.unplug(offset, blocks * _BLOCK)
            assert device.pages() == ours.pages()

        plug(0, 4)
        convert(0, _BLOCK, private=False)
        convert(_BLOCK, 4 * KIB, private=False)
        before = device.pages()
        convert(4 * _BLOCK, _BLOCK, private=False)  # shared while it is unplugged
        assert device.pages() == before
        plug(4 * _BLOCK, 1)  # and mapped when it is plugged
        assert len(device.pages() - before) == _BLOCK // 4096
        unplug(0, 1)
        plug(0, 1)  # shared still: mapped again
        assert device.pages() >= before
        convert(0, 4 * KIB, private=True)
        unplug(0, 4)
        assert virtio_mem.plugged_size == driver.config().plugged


def test_unplug_frees_the_pages_before_it_unmaps_them(double: Double) -> None:
    # For an instant the device reaches pages that are free. GuestMemory unmaps first
    # (tests/test_virtio_mem.py).
    device = double.vfio_user_device()
    guest = double.guest(GuestOptions(virtio_mem=32 * MIB), device)
    driver = VirtioMemDriver(guest, _QUEUE)
    base = driver.config().address
    driver.request_size(16 * MIB)
    driver.plug(base, 1)
    guest.convert(base, _BLOCK, private=False)
    guest.log.skip()
    assert driver.unplug(base, 1) is Answer.ACK

    steps = [step.replace("0000:00:01.0/", "") for step in joined(guest.log.new())]
    assert steps == [
        "virtio_mem_unplug_request addr=0x100000000 nb_blocks=1",
        "ram_block_discard_shared_range pluggable@HVA + 0x200000: madvise: 1 fallocate: 1 ret: 0",
        "vfio_user_dma_unmap [0x100000000, 0x100200000) in 1 calls",
        "virtio_mem_send_response type=0",
    ]


def test_device_refuses_what_was_not_asked_for(double: Double) -> None:
    guest = double.guest(GuestOptions(virtio_mem=32 * MIB))
    driver = VirtioMemDriver(guest, _QUEUE)
    base = driver.config().address
    driver.request_size(8 * MIB)

    assert driver.plug(base, 5) is Answer.NACK  # more than was asked for
    assert driver.plug(base, 2) is Answer.ACK
    assert driver.plug(base, 1) is Answer.ERROR  # it is plugged
    assert driver.unplug(base + 8 * MIB, 1) is Answer.ERROR
    assert driver.unplug_all() is Answer.ACK
    assert driver.config().plugged == 0
