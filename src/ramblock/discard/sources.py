# SPDX-License-Identifier: Apache-2.0
"""The plug point for discard sources."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain, starmap
from typing import Protocol

from ramblock.errors import UsageError, describe_range
from ramblock.ranges import Runs, complement, merge


class Source(Protocol):
    """
    Something that knows which parts of a block are populated (QEMU: RamDiscardSource).

    Its owner tells the manager of each change, and of nothing that did not change: listeners hear
    it as it is told.

    Optional members:

    - ``ranges(offset, size) -> Iterator[(offset, size)]``: the populated runs,
      ascending; the rest outside the range is cut off. Without it, ``is_populated`` is asked
      granule by granule.
    - ``on_adding()``: called under the lock before the source is added; raising refuses.
    - ``on_removed()``: called once it was removed, or when adding it failed.
    - ``withholds = True``: the guest itself cannot use discarded parts (virtio-mem): they are freed
      when it is added.
    """

    @property
    def granularity(self) -> int:
        """Smallest piece whose state can change, in bytes; a power of two."""

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether all of ``[offset, offset + size)`` is populated; any alignment."""


def populated_in(source: Source, start: int, end: int) -> Runs:
    """Yield the populated runs of *source* in [start, end); UsageError: an impossible answer."""
    ranges = getattr(source, "ranges", None)
    if ranges is None:
        yield from merge(_granules(source, start, end))
        return
    position, inside = start, source.granularity - 1
    for offset, size in ranges(start, end - start):
        # A source that thinks in larger granules says more than it was asked for.
        low, high = max(offset, start), min(offset + size, end)
        if low >= high and size > 0:
            continue
        cut = (low != start and low & inside) or (high != end and high & inside)
        if low < position or size <= 0 or cut:
            raise UsageError(
                f"source {source!r} answered {describe_range(offset, size)}, which is empty, does"
                f" not lie behind {position:#x}, or cuts a granule of {inside + 1:#x} bytes",
                value=(offset, size),
                expected="ascending, disjoint runs of whole granules",
            )
        yield low, high
        position = high


def _granules(source: Source, start: int, end: int) -> Runs:
    granularity = source.granularity
    while start < end:
        # Up to the source's next boundary: its state cannot change inside a granule.
        stop = min(end, (start // granularity + 1) * granularity)
        if source.is_populated(start, stop - start):
            yield start, stop
        start = stop


def held_back_by(source: Source, start: int, end: int) -> Runs:
    """Yield the rest of [start, end), behind and between :func:`populated_in`."""
    return complement(populated_in(source, start, end), start, end)


def joint_runs(runs: Runs, sources: Iterable[Source]) -> Runs:
    """Yield the parts of *runs* that every one of *sources* calls populated."""
    for source in sources:
        runs = chain.from_iterable(starmap(partial(populated_in, source), runs))
    return merge(runs)
