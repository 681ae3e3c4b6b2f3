"""
The core against QEMU's rules, at random and for long.

RAMBLOCK_DIFFERENTIAL says how many operations: 4,000 where nobody says anything.
"""

import logging
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from differential import Differential
from doubles import PAGE
from ramblock import GuestMemory, MappingPolicy, PageState, RamBlock, VirtioMem
from ramblock.dma import SoftIommu
from ramblock.errors import UsageError
from ramblock.testing import pages_of

OPERATIONS = int(os.environ.get("RAMBLOCK_DIFFERENTIAL", "4000"))
SEEDS = 8
SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_difference(seed: int) -> None:
    run = Differential(seed)
    for number in range(-(-OPERATIONS // SEEDS)):
        try:
            run.step()
        except BaseException as error:
            error.add_note(f"seed {seed}, operation {number}")
            raise
    told = ", ".join(f"{count} {name}" for name, count in sorted(run.done.items()))
    sys.stderr.write(f"seed {seed}: {run.done.total()} operations, 0 differences ({told})\n")
    run.close()
    if OPERATIONS >= 4000:
        assert run.done["convert to shared"] > 10
        assert sum(count for name, count in run.done.items() if "Error" in name) > 10


@pytest.mark.timeout(0)
def test_six_threads() -> None:
    """Each thread has pages of its own, in blocks that all share, and knows what it did to them."""
    count, threads, each = 96, 6, 16
    memory = GuestMemory()
    ram = RamBlock.create("ram", count * PAGE, private="stand-in")
    hotplug = RamBlock.create("hotplug", count * PAGE, private="stand-in")
    memory.map(ram, 0, size=count // 2 * PAGE)
    memory.map(ram, 1 << 30, offset=count // 2 * PAGE)
    # Borders of sections inside blocks of the device.
    for first in range(0, count, 6):
        memory.map(hotplug, (1 << 32) + first * PAGE, offset=first * PAGE, size=6 * PAGE)
    device = VirtioMem(hotplug, 4 * PAGE)
    iommus = [SoftIommu(), SoftIommu(cut=False), SoftIommu(exact=True)]
    for iommu in iommus:
        memory.attach(iommu, MappingPolicy.AUTO)
    shared: list[set[int]] = [set() for _ in range(threads)]
    plugged: list[set[int]] = [set() for _ in range(threads)]
    done: Counter[str] = Counter()
    failures: list[BaseException] = []

    def gpa_of(page: int) -> int:
        return page * PAGE if page < count // 2 else (1 << 30) + (page - count // 2) * PAGE

    def work(number: int) -> None:
        choose = random.Random(number)
        mine = range(number * each, (number + 1) * each)
        try:
            for _ in range(OPERATIONS // threads):
                what = choose.randrange(10)
                page = choose.choice(mine)
                to = choose.choice((SHARED, PRIVATE))
                if what < 5:
                    memory.convert(gpa_of(page), PAGE, to)
                    (shared[number].add if to is SHARED else shared[number].discard)(page)
                elif what < 7:
                    memory.convert((1 << 32) + page * PAGE, PAGE, to)
                    key = page + count
                    (shared[number].add if to is SHARED else shared[number].discard)(key)
                elif what < 9:
                    first = page // 4 * 4
                    pages = set(range(first, first + 4))
                    there = pages <= plugged[number]
                    (device.unplug if there else device.plug)(first * PAGE, 4 * PAGE)
                    plugged[number] ^= pages
                else:
                    with pytest.raises(UsageError):
                        memory.convert(1 << 50, PAGE, to)
                done[threading.current_thread().name] += 1
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    coming: list[BaseException] = []
    stop = threading.Event()

    def come_and_go() -> None:
        try:
            while not stop.is_set():
                mapper = memory.attach(SoftIommu())
                memory.detach(mapper)
        except BaseException as error:
            coming.append(error)

    workers.append(threading.Thread(target=come_and_go))
    for worker in workers:
        worker.start()
    for worker in workers[:-1]:
        worker.join()
    stop.set()
    workers[-1].join()
    assert failures == []
    assert coming == []
    everything = set().union(*shared)
    available = set().union(*plugged)
    expected = {gpa_of(page) for page in everything if page < count}
    expected |= {
        (1 << 32) + (page - count) * PAGE
        for page in everything
        if page >= count and page - count in available
    }
    for iommu in iommus:
        assert pages_of(iommu.mappings()) == expected
    sys.stderr.write(f"six threads: {done.total()} operations, 0 differences\n")
    ram.close()
    hotplug.close()
