"""Things that belong to one process: no use in a fork, and no copies."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from doubles import PAGE, RecordingListener, section
from ramblock import GuestMemory, PageState, RamBlock, RamSection, VirtioMem
from ramblock.dma import HostRange, SoftIommu
from ramblock.interrupts import uninterrupted

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Guest(NamedTuple):
    memory: GuestMemory
    block: RamBlock
    spare: RamBlock
    device: VirtioMem
    iommu: SoftIommu


@pytest.fixture
def guest() -> Iterator[Guest]:
    memory = GuestMemory()
    block = RamBlock.create("ram", 8 * PAGE, private="stand-in")
    spare = RamBlock.create("spare", PAGE)
    memory.map(block, 0)
    device = VirtioMem(block, PAGE)
    device.plug(0, 8 * PAGE)
    iommu = SoftIommu()
    memory.attach(iommu)
    memory.convert(0, 4 * PAGE, SHARED)
    block.write(0, b"parent")
    yield Guest(memory, block, spare, device, iommu)
    block.close()
    spare.close()


def in_child(work: Callable[[], object], seconds: float = 20) -> str:
    """Run *work* in a fork; what it returned or raised, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                text = str(work())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
        finally:
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            raise AssertionError("the child hangs")
        time.sleep(0.005)
    with os.fdopen(reader, "rb") as told:
        return told.read().decode()


CHANGES: dict[str, Callable[[Guest], object]] = {
    "convert": lambda guest: guest.memory.convert(0, PAGE, PRIVATE),
    "map": lambda guest: guest.memory.map(guest.spare, 1 << 20),
    "unmap": lambda guest: guest.memory.unmap(guest.memory.sections[0]),
    "attach": lambda guest: guest.memory.attach(SoftIommu()),
    "detach": lambda guest: guest.memory.detach(guest.memory.mappers[0]),
    "reset": lambda guest: guest.memory.reset(),
    "unplug": lambda guest: guest.device.unplug(0, PAGE),
    "unplug_all": lambda guest: guest.device.unplug_all(),
    "free_pending": lambda guest: guest.block.free_pending(),
    "register_listener": lambda guest: guest.block.discard_manager.register_listener(
        RecordingListener(), section(guest.block)
    ),
    "virtio-mem": lambda guest: VirtioMem(guest.spare, PAGE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_in_a_fork_every_memory_refuses(guest: Guest, name: str) -> None:
    told = in_child(lambda: CHANGES[name](guest))
    assert told.startswith("UsageError: ")
    assert "belongs to the process that forked this one" in told
    # Nothing has happened to the parent's pages and devices.
    assert guest.iommu.read(0, 6) == b"parent"
    assert guest.block.allocated_bytes() == PAGE
    CHANGES[name](guest)  # and the parent goes on


def test_a_fork_may_read_and_close(guest: Guest) -> None:
    def work() -> object:
        data = guest.block.read(0, 6)
        guest.block.close()
        return data, guest.block.closed

    assert in_child(work) == "(b'parent', True)"
    assert not guest.block.closed
    assert guest.iommu.read(0, 6) == b"parent"
    assert guest.memory.convert(0, PAGE, PRIVATE).changed_bytes == PAGE


def test_a_fork_may_have_memory_of_its_own(guest: Guest) -> None:
    def work() -> object:
        memory = GuestMemory()
        with RamBlock.create("own", PAGE, private="stand-in") as block:
            memory.map(block, 0)
            return memory.convert(0, PAGE, SHARED).changed_bytes

    assert in_child(work) == str(PAGE)


def test_a_fork_while_another_thread_converts_does_not_hang(guest: Guest) -> None:
    stop = threading.Event()

    def convert() -> None:
        while not stop.is_set():
            guest.memory.convert(4 * PAGE, PAGE, SHARED)
            guest.memory.convert(4 * PAGE, PAGE, PRIVATE)

    thread = threading.Thread(target=convert)
    thread.start()
    try:
        for _ in range(12):
            told = in_child(lambda: guest.memory.convert(0, PAGE, PRIVATE))
            assert told.startswith("UsageError")
    finally:
        stop.set()
        thread.join()
    assert guest.iommu.read(0, 6) == b"parent"


def test_a_fork_of_another_thread_has_a_main_thread_too(guest: Guest) -> None:
    """Interrupts wait on the one thread that the fork has, whichever it was before."""

    def work() -> object:
        return uninterrupted(lambda: signal.getsignal(signal.SIGINT) is before)

    before = signal.getsignal(signal.SIGINT)
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(in_child(work)))
    thread.start()
    thread.join()
    assert told == ["False"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_that_holds_memory_is_copied(guest: Guest, how: Callable[[object], object]) -> None:
    things = [
        guest.memory,
        guest.block,
        guest.block.attributes,
        guest.block.discard_manager,
        guest.block.shared,
        guest.block.private,
        guest.device,
        guest.iommu,
    ]
    for thing in things:
        with pytest.raises(TypeError, match="cannot be copied"):
            how(thing)
        with suppress(TypeError):
            how(RamSection(guest.block, 0, PAGE))
    assert guest.iommu.read(0, 6) == b"parent"


def test_targets_and_vms_outside_are_not_copied_either() -> None:
    from ramblock.dma import IommufdIoas, Type1Container, VfioUserTarget
    from ramblock.dma.mapper import Mapper
    from ramblock.kvm import GuestMemfd, Kvm, KvmVm, Vcpu
    from ramblock.process import OfOneProcess
    from ramblock.testing import SimulatedInPlace
    from ramblock.uapi.owned import OwnedDescriptor
    from ramblock.vfio import VfioDevice

    for kind in (
        IommufdIoas,
        Type1Container,
        VfioUserTarget,
        GuestMemfd,
        Kvm,
        KvmVm,
        Vcpu,
        OwnedDescriptor,
        VfioDevice,
        SimulatedInPlace,
        Mapper,
    ):
        assert issubclass(kind, OfOneProcess), kind


def test_values_are_copied(guest: Guest) -> None:
    memory = HostRange(3, 0, 0x1000, PAGE)
    assert copy.deepcopy(memory) == pickle.loads(pickle.dumps(memory)) == memory
