"""
The steps of QEMU's conversions as lines of its trace, with ranges for runs of maps, and their
comparison with a run.

A table has one line per step. Maps and unmaps that follow each other are one line:
``vfio_user_dma_map [0x200000, 0x210000) in 16 calls``; everything else is the line as QEMU wrote
it, without host addresses and the numbers of descriptors.
"""

import re
from collections.abc import Iterable

from lab.qemu_double import TraceLine

__all__ = ["compare_steps", "steps_of"]

# Where the conversion is told a second time, by the hypercall's handler; and what is not about
# memory.
_LEFT_OUT = ("kvm_hc_map_gpa_range", "vfio_listener_region_skip")
_JOINED = ("vfio_user_dma_map", "vfio_user_dma_unmap")
_HOST_ADDRESS = re.compile(r"@0x[0-9a-f]+")


def steps_of(lines: Iterable[TraceLine]) -> list[str]:
    """Return the steps, in the form of the tables."""
    steps: list[str] = []
    run: tuple[str, int, int, int] | None = None  # name, start, end, calls
    for line in lines:
        if line.name in _LEFT_OUT:
            continue
        if line.name in _JOINED:
            iova, size = line.numbers()[:2]
            if run is not None and run[0] == line.name and run[2] == iova:
                run = (line.name, run[1], iova + size, run[3] + 1)
                continue
        if run is not None:
            steps.append(_text(*run))
            run = None
        if line.name in _JOINED:
            iova, size = line.numbers()[:2]
            run = (line.name, iova, iova + size, 1)
        else:
            steps.append(_HOST_ADDRESS.sub("@HVA", str(line)))
    if run is not None:
        steps.append(_text(*run))
    return steps


def _text(name: str, start: int, end: int, calls: int) -> str:
    return f"{name} [{start:#x}, {end:#x}) in {calls} calls"


def compare_steps(expected: Iterable[str], found: Iterable[str]) -> str | None:
    """Say which step is the first that differs, and which word of it; None: none does."""
    expected, found = list(expected), list(found)
    for number, (left, right) in enumerate(zip(expected, found, strict=False), 1):
        if left == right:
            continue
        words = zip(left.split(), right.split(), strict=False)
        differing = next((pair for pair in words if pair[0] != pair[1]), None)
        what = (
            f"word {differing[0]!r} of the table is {differing[1]!r}"
            if differing
            else "one of them has more words"
        )
        return f"step {number}: {what}\n  table: {left}\n  QEMU:  {right}"
    if len(expected) != len(found):
        number = min(len(expected), len(found)) + 1
        more, rest = ("table", expected) if len(expected) > len(found) else ("QEMU", found)
        return f"step {number}: only {more} has it: {rest[number - 1]}"
    return None
