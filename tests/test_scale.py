"""
A guest of 16 TiB costs what is shared of it, not what it could share.

No time is asserted here: what a conversion costs beside the size of the guest is measured in
benchmarks/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from typing import Any

from ramblock import GuestMemory, PageState, RamBlock, RamSection
from ramblock.testing import RecordingTarget
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE, TIB

# In a process of its own: what this one holds after the other tests says nothing.
_GUEST = """
import json, sys
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import SoftIommu

GIB, TIB = 1 << 30, 1 << 40
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def peak():
    # Not ru_maxrss: that also counts what the parent had when it forked.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

before = resident()
memory = GuestMemory()
block = RamBlock.create("ram", 16 * TIB, private="stand-in")
memory.map(block, 0)
iommu = SoftIommu()
mapper = memory.attach(iommu)
pieces, spread = int(sys.argv[1]), int(sys.argv[2])
size = GIB // pieces
for number in range(pieces):
    memory.convert(number * (spread // pieces), size, PageState.SHARED)
memory.convert(5 * size, 4096, PageState.SHARED)
shared = list(memory.ranges(PageState.SHARED))
private = sum(size for _, size in memory.ranges(PageState.PRIVATE))
late = memory.attach(SoftIommu())
print(json.dumps({
    "resident": resident(),
    "peak": peak(),
    "gained": resident() - before,
    "runs": len(shared),
    "private": private,
    "entries": mapper.entries,
    "late_entries": late.entries,
    "late_calls": late.map_calls,
    "allocated": block.allocated_bytes(),
}))
"""


def _guest(pieces: int, spread: int = 16 * TIB) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _GUEST, str(pieces), str(spread)],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_sixteen_terabytes_with_one_gigabyte_shared_in_one_piece() -> None:
    guest = _guest(1)
    assert guest["peak"] < 300 * MIB
    assert guest["gained"] < 16 * MIB
    assert guest["runs"] == 2
    assert guest["private"] == 16 * TIB - GIB - PAGE_SIZE
    assert guest["late_entries"] == guest["late_calls"] == 2
    assert guest["allocated"] == 0, "converting touches no memory"


def test_sixteen_terabytes_with_one_gigabyte_shared_in_fragments() -> None:
    """
    16,384 pieces of 64 KiB, each second one of 2 GiB: what a guest's pools and rings look like.
    """
    guest = _guest(16384, 2 * GIB)
    assert guest["peak"] < 300 * MIB
    assert guest["runs"] == 16384
    # One more page was converted beside the third piece: a mapping of its own then, and part of
    # that run in a replay.
    assert guest["entries"] == 16385
    assert guest["late_entries"] == guest["late_calls"] == 16384
    assert guest["allocated"] == 0


def test_sixteen_terabytes_with_one_gigabyte_shared_in_fragments_all_over() -> None:
    """
    16,384 pieces of 64 KiB, one per GiB: what a guest can do on purpose costs bits, and those only
    where it does it.
    """
    guest = _guest(16384)
    assert guest["peak"] < 300 * MIB + 3 * 16384 * 8192, "at most the chunks of three bitmaps"
    assert guest["runs"] >= 16384
    assert guest["entries"] == guest["late_entries"] == guest["late_calls"]


def test_a_guest_that_nobody_touched_costs_nothing_to_search() -> None:
    with RamBlock.create("ram", 16 * TIB, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, 0)
        tracemalloc.start()
        try:
            assert list(memory.ranges(PageState.PRIVATE)) == [(0, 16 * TIB)]
            assert list(memory.ranges(PageState.SHARED)) == []
            assert not block.discard_manager.is_populated(RamSection(block, 0, block.size))
            assert list(block.discard_manager.populated(RamSection(block, 0, block.size))) == []
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 256 * KIB


class _Counting:
    def __init__(self) -> None:
        self.sections: list[RamSection] = []

    def notify_populate(self, section: RamSection) -> None:
        self.sections.append(section)

    def notify_discard(self, section: RamSection) -> None:
        """Closing tells it."""


def test_a_replay_of_ten_runs_is_ten_calls() -> None:
    with RamBlock.create("ram", 16 * TIB, private="stand-in") as block:
        attributes = block.attributes
        assert attributes is not None
        places = [number * TIB + 3 * MIB for number in range(10)]
        for place in places:
            attributes.state_change(place, 2 * MIB, PageState.SHARED)
        listener = _Counting()
        tracemalloc.start()
        try:
            block.discard_manager.register_listener(listener, RamSection(block, 0, block.size))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert [(section.offset, section.size) for section in listener.sections] == [
            (place, 2 * MIB) for place in places
        ]
        # A listener per page, or a copy of the states, would be hundreds of megabytes.
        assert peak < 256 * KIB


def test_and_so_it_is_for_a_device_that_comes_later() -> None:
    memory, target = GuestMemory(), RecordingTarget()
    with RamBlock.create("ram", 16 * TIB, private="stand-in") as block:
        memory.map(block, 0)
        places = [number * TIB + 3 * MIB for number in range(10)]
        for place in places:
            memory.convert(place, 2 * MIB, PageState.SHARED)
        mapper = memory.attach(target)
        assert target.calls == [("map", place, 2 * MIB) for place in places]
        assert mapper.map_calls == mapper.entries == 10
        memory.detach(mapper)
        assert mapper.entries == 0
