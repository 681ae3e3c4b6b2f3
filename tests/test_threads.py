"""
Eight threads convert and four do DMA over a small range, with the interpreter switching as often as
it can.

A checker inside the target and the attribute setter looks at each call; a watchdog says if anybody
waits forever.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import DmaCapabilities, HostRange, SoftIommu
from ramblock.errors import IommuFault
from ramblock.events import StateChanged
from ramblock.hostmem import MemfdBacking, StandInPrivate
from ramblock.units import PAGE_SIZE
from vfio_user_server import RemoteIommu

P = PAGE_SIZE
_PAGES = 16
_SECONDS = float(os.environ.get("RAMBLOCK_STRESS_SECONDS", "10"))


class Picture:
    """What is private and what is mapped, as sets of pages; no code of the library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.private: set[int] = set()
        self.mapped: dict[str, set[int]] = {}
        self.violations: list[str] = []

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:
        pages = set(range(gpa, gpa + size, P))
        with self.lock:
            if private:
                for name, mapped in self.mapped.items():
                    if mapped & pages:
                        self.violations.append(
                            f"{name}: {mapped & pages} mapped while made private"
                        )
                self.private |= pages
            else:
                self.private -= pages


class CheckedIommu:
    """An IOMMU that checks each call against the picture."""

    def __init__(self, name: str, picture: Picture, inner: SoftIommu | RemoteIommu) -> None:
        self.name = name
        self.inner = inner
        self._picture = picture
        self._mapped = picture.mapped.setdefault(name, set())

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        pages = set(range(iova, iova + memory.size, P))
        with self._picture.lock:
            if pages & self._picture.private:
                self._picture.violations.append(f"{self.name}: private pages mapped: {pages}")
            self._mapped |= pages
        self.inner.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        removed = self.inner.unmap(iova, size)
        with self._picture.lock:
            self._mapped.difference_update(range(iova, iova + size, P))
        return removed

    def close(self) -> None:
        self.inner.close()


class CheckedMemory(MemfdBacking):
    """The shared side of the block at *gpa*: nothing of it is freed that any target maps."""

    def __init__(self, name: str, size: int, gpa: int, picture: Picture) -> None:
        super().__init__(name, size)
        self._gpa = gpa
        self._picture = picture

    def discard(self, offset: int, size: int) -> None:
        pages = set(range(self._gpa + offset, self._gpa + offset + size, P))
        with self._picture.lock:
            for name, mapped in self._picture.mapped.items():
                if mapped & pages:
                    self._picture.violations.append(f"{name}: {mapped & pages} mapped while freed")
        super().discard(offset, size)


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_conversions_and_dma_on_many_threads() -> None:
    picture = Picture()
    memory = GuestMemory(picture)
    half = _PAGES // 2 * P
    blocks = []
    for name, gpa in (("one", 0), ("two", half)):
        shared_side = CheckedMemory(name, half, gpa, picture)
        private_side = StandInPrivate(name, half)
        blocks.append(RamBlock(name, shared_side, private_side, owns_private=True))
        memory.map(blocks[-1], gpa)
    events: list[StateChanged] = []
    memory.observer = events.append  # called under the lock: in the order in which things happened
    iommus = [
        CheckedIommu("cut", picture, SoftIommu()),
        CheckedIommu("no cut", picture, SoftIommu(cut=False)),
        CheckedIommu("exact", picture, SoftIommu(exact=True)),
        CheckedIommu("vfio-user", picture, RemoteIommu()),
    ]
    for iommu in iommus:
        memory.attach(iommu)
    stop = threading.Event()
    dead: list[BaseException] = []
    conversions = [0] * 8
    accesses = [0] * 4
    faults = [0] * 4

    def convert(number: int) -> None:
        numbers = random.Random(number)
        while not stop.is_set():
            start = numbers.randrange(_PAGES)
            size = numbers.randrange(1, _PAGES - start + 1)
            memory.convert(start * P, size * P, numbers.choice(list(PageState)))
            conversions[number] += 1

    def do_dma(number: int) -> None:
        numbers = random.Random(100 + number)
        iommu = iommus[number % len(iommus)].inner
        while not stop.is_set():
            iova = numbers.randrange(_PAGES * P - 8)
            try:
                if numbers.random() < 0.5:
                    iommu.write(iova, b"12345678")
                else:
                    assert len(iommu.read(iova, 8)) == 8
                accesses[number] += 1
            except IommuFault:
                faults[number] += 1

    def guarded(work: object, number: int) -> None:
        try:
            work(number)  # type: ignore[operator]  # one of the two above
        except BaseException as error:
            dead.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(convert, n), daemon=True) for n in range(8)]
    threads += [threading.Thread(target=guarded, args=(do_dma, n), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    stop.wait(_SECONDS)
    stop.set()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.1))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        pytest.fail("a thread waits forever")
    assert not dead, dead
    assert not picture.violations, picture.violations[:5]
    assert not memory.poisoned
    assert all(conversions), "every thread converted"
    assert all(accesses), "DMA succeeded on every thread"
    assert all(faults), "DMA faulted on every thread"

    shared = {
        page for gpa, size in memory.ranges(PageState.SHARED) for page in range(gpa, gpa + size, P)
    }
    assert shared == set(range(0, _PAGES * P, P)) - picture.private
    for iommu in iommus:
        assert picture.mapped[iommu.name] == shared
        mapped = {
            page
            for mapping in iommu.inner.mappings()
            for page in range(mapping.iova, mapping.iova + mapping.size, P)
        }
        assert mapped == shared
    # What happened, in that order, gives what is now.
    replayed: set[int] = set()
    for event in events:
        gpa = event.offset + (half if event.block == "two" else 0)
        touched = set(range(gpa, gpa + event.size, P))
        replayed = replayed | touched if event.after == "shared" else replayed - touched
    assert replayed == shared
    # No write of a device arrived after the memory was freed, and nothing that is private was
    # forgotten.
    for page in set(range(0, _PAGES * P, P)) - shared:
        assert blocks[page // half].read(page % half, P) == bytes(P)
    for block in blocks:
        assert block.not_freed_bytes == 0
        block.close()
    for iommu in iommus:
        iommu.close()


def test_two_memories_that_want_each_others_blocks_do_not_wait_for_each_other() -> None:
    one, two = GuestMemory(), GuestMemory()
    first = RamBlock.create("first", P, private="stand-in")
    second = RamBlock.create("second", P, private="stand-in")
    one.map(first, 0)
    two.map(second, 0)
    refused: list[str] = []

    def want(memory: GuestMemory, block: RamBlock) -> None:
        for _ in range(200):
            try:
                memory.map(block, 16 * P)
            except ValueError as error:
                refused.append(str(error))

    threads = [
        threading.Thread(target=want, args=(one, second), daemon=True),
        threading.Thread(target=want, args=(two, first), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(refused) == 400
    first.close()
    second.close()
