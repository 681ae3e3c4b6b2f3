"""
QEMU's confidential guests on a real kernel: private memory is private, and DMA goes through the
IOMMU.

Where QEMU is wrong (tests/qemu/test_defects.py) a device proves it here: it writes to a page that
is private, and the guest never sees what it wrote. The same story on GuestMemory, with the same
device, ends with a refusal.
"""

import errno
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from iommu_trace import IommuTrace
from lab.qemu_double import (
    KIB,
    MIB,
    Call,
    ConfidentialGuest,
    Container,
    Double,
    GuestOptions,
    GuestStopped,
    GuestTestdev,
    QemuEnded,
    Technology,
    Way,
)
from lab_devices import Rig, entry_limit, open_rig
from lab_devices import Way as OurWay
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock
from ramblock.kvm import Kvm, VmType
from ramblock.vfio import EduDevice, IommuTestdev

pytestmark = [
    pytest.mark.lab_variant("intel-iommu", "amd-iommu", "one-vcpu"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

_TESTDEV = (IommuTestdev.VENDOR, IommuTestdev.DEVICE)
_EDU = (EduDevice.VENDOR, EduDevice.DEVICE)
_ROM, _ROM_SIZE = 0xC0000, 0x20000
_WRITTEN_BY_GUEST = 0x600D_DA7A
_PATTERN = int.from_bytes(IommuTestdev.pattern(4), "little")
_OURS = {Container.TYPE1: OurWay.TYPE1, Container.IOMMUFD: OurWay.CUTTING}


@pytest.fixture
def double() -> Iterator[Double]:
    with Double(Way.REAL) as double:
        yield double


@pytest.fixture(params=list(Container), ids=lambda container: container.value)
def container(request: pytest.FixtureRequest) -> Container:
    container: Container = request.param
    return container


def _pages(start: int, size: int) -> set[int]:
    return set(range(start // 4096, (start + size) // 4096))


def _start(
    double: Double,
    container: Container,
    *,
    resets: bool = False,
    technology: Technology = Technology.SNP,
) -> tuple[ConfidentialGuest, GuestTestdev]:
    assigned = double.assigned_device(*_TESTDEV, container)
    guest = double.guest(GuestOptions(resets=resets, technology=technology), assigned)
    return guest, GuestTestdev(guest)


@contextmanager
def _ours(container: Container) -> Iterator[tuple[GuestMemory, Rig]]:
    """A software-protected VM of ours, with RAM and ROM as QEMU's, and the same device."""
    with ExitStack() as stack:
        vm = stack.enter_context(stack.enter_context(Kvm()).create_vm(VmType.SW_PROTECTED))
        memory = GuestMemory(vm)
        layout = (("low", 0, _ROM), ("rom", _ROM, _ROM_SIZE), ("high", _ROM + _ROM_SIZE, 32 * MIB))
        for name, gpa, size in layout:
            private = stack.enter_context(vm.create_guest_memfd(size))
            memory.map(stack.enter_context(RamBlock.create(name, size, private=private)), gpa)
        rig = stack.enter_context(open_rig(_OURS[container]))
        mapper = memory.attach(rig.target, MappingPolicy.AUTO)
        stack.callback(memory.detach, mapper)
        yield memory, rig


@pytest.mark.parametrize("technology", Technology, ids=lambda technology: technology.name)
def test_device_reaches_shared_pages_and_the_iommu_refuses_all_others(
    double: Double, container: Container, technology: Technology
) -> None:
    guest, testdev = _start(double, container, technology=technology)
    base, size = 2 * MIB, 16 * KIB

    assert not testdev.reaches(base)
    assert guest.convert(base, size, private=False) == 0
    assert testdev.reached(base - 4 * KIB, size + 8 * KIB) == _pages(base, size)
    assert guest.read(base, 4) == _PATTERN
    assert guest.convert(base, 4 * KIB, private=True) == 0
    assert testdev.reached(base, size) == _pages(base + 4 * KIB, size - 4 * KIB)
    # A private page of the guest's own, and the shared one is freed.
    guest.write(base, _WRITTEN_BY_GUEST, 4)
    assert not testdev.reaches(base)
    assert guest.read(base, 4) == _WRITTEN_BY_GUEST
    assert guest.convert(base, 4 * KIB, private=False) == 0
    assert guest.read(base, 4) == 0
    assert guest.end() == 0


def test_kernel_maps_what_qemu_and_guest_memory_say(double: Double, container: Container) -> None:
    guest, testdev = _start(double, container)
    rng = random.Random(1)
    memory = GuestMemory()
    low, high = MIB, 5 * MIB
    with IommuTrace(0) as trace, RamBlock.create("ram", 8 * MIB, private="stand-in") as block:
        memory.map(block, 0)
        mapped: set[int] = set()
        shared: set[int] = set()
        for number in range(40):
            size = rng.choice((1, 1, rng.randrange(1, 17), rng.randrange(1, 65))) * 4 * KIB
            gpa = rng.choice((low, 4 * MIB)) + rng.randrange(128) * 4 * KIB
            private = rng.random() < 0.5
            assert guest.convert(gpa, size, private=private) == 0
            memory.convert(gpa, size, PageState.PRIVATE if private else PageState.SHARED)
            for event in trace.read():
                pages = event.pages & _pages(low, high - low)
                mapped = mapped | pages if event.verb == "map" else mapped - pages
            shared = {
                page
                for start, length in memory.ranges(PageState.SHARED)
                for page in _pages(start, length)
            }
            assert mapped == shared, f"request {number}: [{gpa:#x}, {gpa + size:#x}) {private}"
        for page in rng.sample(sorted(_pages(low, 2 * MIB)), 30):
            assert testdev.reaches(page * 4096) is (page in shared)


def test_after_a_reset_the_device_reaches_a_private_page(
    double: Double, container: Container
) -> None:
    guest, testdev = _start(double, container, resets=True)
    base, size = 2 * MIB, 16 * KIB
    guest.convert(base, size, private=False)
    guest.reset()
    testdev = GuestTestdev(guest)

    guest.write(base, _WRITTEN_BY_GUEST, 4)
    assert testdev.reached(base, size) == _pages(base, size)  # let through by the IOMMU
    assert guest.read(base, 4) == _WRITTEN_BY_GUEST  # and written to memory that is no longer its
    # The guest asks for what it needs: QEMU takes the pages for shared already, and does nothing.
    guest.convert(base, 4 * KIB, private=False)
    assert guest.read(base, 4) == _PATTERN
    guest.convert(base, 4 * KIB, private=True)
    assert not testdev.reaches(base)
    assert guest.end() == 0

    with _ours(container) as (memory, rig):
        memory.convert(base, size, PageState.SHARED)
        assert rig.reached(size // 4096, base) == set(range(size // 4096))
        assert memory.reset() == 0
        assert rig.reached(size // 4096, base) == set()


def test_over_the_border_of_a_rom_the_device_reaches_a_private_page(
    double: Double, container: Container
) -> None:
    guest, testdev = _start(double, container)
    before, size = _ROM - 8 * KIB, 16 * KIB
    guest.convert(_ROM, 8 * KIB, private=False)
    guest.convert(before, size, private=True)

    assert testdev.reached(before, size) == _pages(_ROM, 8 * KIB)
    guest.write(_ROM, _WRITTEN_BY_GUEST, 4)
    assert testdev.reaches(_ROM)
    assert guest.read(_ROM, 4) == _WRITTEN_BY_GUEST
    guest.convert(_ROM, 8 * KIB, private=True)
    guest.convert(before, size, private=False)
    assert testdev.reached(before, size) == _pages(before, 8 * KIB)  # the ROM's are missing
    assert guest.end() == 0

    with _ours(container) as (memory, rig):
        memory.convert(_ROM, 8 * KIB, PageState.SHARED)
        memory.convert(before, size, PageState.PRIVATE)
        assert rig.reached(4, before) == set()
        memory.convert(before, size, PageState.SHARED)
        assert rig.reached(4, before) == {0, 1, 2, 3}


def test_refused_map_in_the_second_device_leaves_the_pages_shared_in_kvm(
    double: Double, container: Container
) -> None:
    devices = [double.assigned_device(*ids, container) for ids in (_TESTDEV, _EDU)]
    guest = double.guest(GuestOptions(), *devices)
    guest.convert(2 * MIB, 16 * KIB, private=False)
    listeners = guest.faults.tally(Call.MAP).calls // 4
    # In one container there is one listener; each of several maps all of its own.
    skip = 4 * (listeners - 1) + 2
    guest.faults.arm(Call.MAP, skip=skip, error=errno.ENOSPC)
    with pytest.raises(GuestStopped, match="internal-error"):
        guest.convert(4 * MIB, 16 * KIB, private=False)

    assert guest.faults.tally(Call.MAP).failed == 1
    attributes = [line for line in guest.shim_log.read_text().splitlines() if "attributes" in line]
    assert attributes[-1].endswith("attributes 0x400000 size 0x4000 -> 0")
    assert guest.status == "internal-error"


def test_guest_that_could_need_more_than_the_limit_is_refused(double: Double) -> None:
    # By QEMU's own check at the start; so no container is ever at its limit later on.
    with entry_limit(20):
        assigned = double.assigned_device(*_TESTDEV, Container.TYPE1)
        with pytest.raises(QemuEnded, match="possibly running out of DMA mappings"):
            double.guest(GuestOptions(), assigned)
