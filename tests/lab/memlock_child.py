"""
A process that may lock 1 MiB and has not CAP_IPC_LOCK: what is converted beyond that is put back.

A program of its own, and without pytest, which an emulated machine takes seconds to import. It gets
the name of a way, and ends with 0 if all was as it should be. Root is not charged, so the parent
takes the capability away before this starts.
"""

import errno
import os
import sys

from lab_devices import BASE, Rig, Way, open_rig
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.errors import ConversionError, DmaError
from ramblock.units import MIB, PAGE_SIZE

SHARED, PRIVATE = PageState.SHARED, PageState.PRIVATE
LIMIT = MIB


def refused(memory: GuestMemory, gpa: int, size: int) -> DmaError:
    refusal = _convert(memory, gpa, size)
    assert refusal is not None, "it was not refused"
    assert (refusal.rolled_back, refusal.step) == (True, "map")
    cause = refusal.__cause__
    assert isinstance(cause, DmaError)
    assert cause.errno == errno.ENOMEM, cause
    return cause


def _convert(memory: GuestMemory, gpa: int, size: int) -> ConversionError | None:
    try:
        memory.convert(gpa, size, SHARED)
    except ConversionError as error:
        return error
    return None


def check(rig: Rig) -> None:
    half = LIMIT // 2
    with RamBlock.create("ram", 2 * LIMIT, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        mapper = memory.attach(rig.target)
        cause = refused(memory, BASE, 2 * LIMIT)
        assert "RLIMIT_MEMLOCK is 1 MiB" in str(cause), cause
        assert "CAP_IPC_LOCK" in str(cause), cause
        assert not memory.poisoned
        check_reached(rig, memory, [])
        assert mapper.entries == 0
        # What fits goes, also after that.
        memory.convert(BASE, half, SHARED)
        refused(memory, BASE + half, LIMIT)
        check_reached(rig, memory, [(BASE, half)])
        memory.convert(BASE, half, PRIVATE)
        memory.convert(BASE + LIMIT, half, SHARED)
        check_reached(rig, memory, [(BASE + LIMIT, half)])
        memory.detach(mapper)


def check_reached(rig: Rig, memory: GuestMemory, shared: list[tuple[int, int]]) -> None:
    assert list(memory.ranges(SHARED)) == shared
    for gpa in range(BASE, BASE + 2 * LIMIT, LIMIT // 8):
        for at in (gpa, gpa + LIMIT // 8 - PAGE_SIZE):
            assert rig.reaches(at) == any(start <= at < start + size for start, size in shared), (
                hex(at)
            )


if __name__ == "__main__":
    with open_rig(Way(sys.argv[1])) as rig:
        check(rig)
    # Not through the interpreter's end, which may take its time.
    os._exit(0)
