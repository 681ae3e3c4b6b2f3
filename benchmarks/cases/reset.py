# SPDX-License-Identifier: Apache-2.0
"""A guest reset: all that is shared becomes private and is unmapped, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.context import Context
from harness.measure import timed
from harness.ours import OURS, confidential_guest
from harness.rows import Row, Samples
from ramblock import GuestMemory, PageState
from ramblock.units import GIB, MIB, PAGE_SIZE

__all__ = ["CASE", "run"]

CASE = "reset of a 1 GiB guest with one target"


def run(context: Context) -> Iterator[Row]:
    """Yield a row for each amount that was shared; none where there is no reset."""
    if not hasattr(GuestMemory, "reset"):
        context.say("this version has no reset of a guest: left out")
        return
    context.say(CASE)
    for name, share in _SHARED.items():
        samples = Samples()
        with confidential_guest(GIB) as memory:
            for _ in range(context.choose(5, 30)):
                share(memory)
                samples.add(OURS, [timed(memory.reset)])
                if next(memory.ranges(PageState.SHARED), None) is not None:
                    raise AssertionError("something is shared after a reset")
        yield samples.row(CASE, {"shared": name})


def _nothing(memory: GuestMemory) -> None:
    """Share nothing."""


def _pool(memory: GuestMemory) -> None:
    """Share a bounce buffer."""
    memory.convert(0, 64 * MIB, PageState.SHARED)


def _board(memory: GuestMemory) -> None:
    """Share every other page of the same size."""
    for gpa in range(0, 64 * MIB, 2 * PAGE_SIZE):
        memory.convert(gpa, PAGE_SIZE, PageState.SHARED)


_SHARED: dict[str, Callable[[GuestMemory], None]] = {
    "nothing": _nothing,
    "64 MiB in one run": _pool,
    "every other page of 64 MiB": _board,
}
