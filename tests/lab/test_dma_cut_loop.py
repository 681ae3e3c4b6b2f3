"""
A device writes one page as fast as it can while the pages beside it are made private and shared
again on another processor.

Not one of its writes may fail. That the loop would notice is shown by the same loop while the page
itself is unmapped and mapped again, as a VMM does that cannot cut.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab_devices import BASE, Rig, Way, host_range, open_rig
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.units import MIB, PAGE_SIZE
from ramblock.vfio import IommuTestdev, TransferTally

SECONDS = 4.0
_SWITCH_SECONDS = 1e-4
BLOCK = 16 * MIB
# The device's page, and how much around it is one mapping when all of the block is.
AT = 8 * MIB


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with open_rig(request.param) as rig:
        yield rig


@contextmanager
def writing(rig: Rig, iova: int) -> Iterator[TransferTally]:
    """Have the device write to *iova* on a thread of its own; the tally is complete afterwards."""
    stop, tally = threading.Event(), TransferTally()
    thread = threading.Thread(target=rig.testdev.write_until, args=(stop, iova, 4, tally))
    # A system call lets the other thread run; taking over again should not take the usual five
    # milliseconds.
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    thread.start()
    try:
        yield tally
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def report(
    capsys: pytest.CaptureFixture[str], rig: Rig, what: str, times: int, tally: TransferTally
) -> None:
    with capsys.disabled():
        sys.stdout.write(
            f"\n{rig.way.value}, {what}: {times} times, {tally.transfers} transfers,"
            f" {tally.refusals} refused"
        )


def test_neighbours_of_a_conversion_never_fault(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    with RamBlock.create("ram", BLOCK, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        mapper = memory.attach(rig.target)
        # One mapping when cutting. With one per page, what is around the device's page is enough.
        first, size = (0, BLOCK) if rig.way is Way.CUTTING else (AT - MIB, 2 * MIB)
        memory.convert(BASE + first, size, PageState.SHARED)
        ends, cuts = time.monotonic() + SECONDS, 0
        with writing(rig, BASE + AT) as tally:
            while time.monotonic() < ends:
                for side in (-PAGE_SIZE, PAGE_SIZE):
                    memory.convert(BASE + AT + side, PAGE_SIZE, PageState.PRIVATE)
                    memory.convert(BASE + AT + side, PAGE_SIZE, PageState.SHARED)
                    cuts += 1
        report(capsys, rig, "pages beside it converted", cuts, tally)
        assert tally.refusals == 0
        assert tally.transfers > 1000
        assert cuts > 10
        assert block.read(AT, 4) == IommuTestdev.pattern(4)
        memory.detach(mapper)


def test_the_loop_notices_a_gap(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    with RamBlock.create("ram", BLOCK) as block:
        page, around = AT // PAGE_SIZE, 4
        memory = host_range(block.fd, block.address, page, around)
        rig.target.map(BASE + AT, memory)
        ends, times = time.monotonic() + SECONDS, 0
        with writing(rig, BASE + AT + PAGE_SIZE) as tally:
            while time.monotonic() < ends:
                rig.target.unmap(BASE + AT, around * PAGE_SIZE)
                rig.target.map(BASE + AT, memory)
                times += 1
        report(capsys, rig, "unmapped and mapped again", times, tally)
        assert tally.refusals > 0
        assert tally.transfers > 0
