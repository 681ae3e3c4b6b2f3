# SPDX-License-Identifier: Apache-2.0
"""
Freeing the memory of a block, with an account of the rest, which could not be freed.

A page of a confidential block has a shared and a private side, and each is used in one state.
Ordinary RAM has the shared side alone. In place one memory serves both states, so that a page is
unused only when it is used in neither::

    a page stops being used   as shared       as private      at all (unplugged)
      split                   shared side     private side    both sides
      ordinary                shared side     -               shared side
      in place                -               -               the memory

Freeing comes after the commit: a failure cannot undo anything, so it goes on the account and is
tried again when something else is freed. Huge pages are freed whole: a part that nobody needs
waits, accounted, until the rest of its huge page is not needed either (QEMU skips hugetlbfs here,
and holds such memory twice).

Memory that waits may come into use again in many ways (a conversion, a plug, a source that comes,
goes or changes its mind). So its use is not remembered but asked, each time before anything is
freed. All of it runs under the memory's lock, which the caller holds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from ramblock.bitmap import SparseBitmap
from ramblock.discard.manager import RamDiscardManager
from ramblock.discard.sources import Source, joint_runs
from ramblock.errors import describe_range
from ramblock.hostmem.backing import SharedBacking
from ramblock.hostmem.in_place import is_in_place
from ramblock.logs import Sparingly
from ramblock.ranges import Runs, complement
from ramblock.units import PAGE_SIZE

_log = logging.getLogger(__name__)

# How many earlier failures one call tries again: the work of a request must not grow with the
# guest's history.
_RETRIES = 4
# How many failures are remembered for that; older ones stay on the account, and free_pending()
# finds them there.
_QUEUE = 1024


def free_each(frees: Iterable[Callable[[], int]]) -> int:
    """Call each of *frees* and add up the bytes that are not freed."""
    not_freed = 0
    # Refusals are on the account and raise nothing. Anything else is raised after all had their
    # turn: memory whose turn never came would be lost.
    failure: BaseException | None = None
    for free in frees:
        try:
            not_freed += free()
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
    return not_freed


class Reclaimer:
    """
    Frees one side of one block.

    :param page_size: The smallest piece that can be freed, in bytes.
    :param discard: Frees whole pages, as (offset, size); raises on failure.
    :param used: Yields the runs inside [start, end) that are in use on this side, ascending.
    """

    def __init__(
        self,
        name: str,
        size: int,
        page_size: int,
        discard: Callable[[int, int], None],
        used: Callable[[int, int], Runs],
    ) -> None:
        self._name = name
        self._page_size = page_size
        self._discard, self._used = discard, used
        self._free_range = self._free if page_size == PAGE_SIZE else self._free_huge
        self._pending = SparseBitmap(size // PAGE_SIZE)
        self._queue: deque[tuple[int, int]] = deque(maxlen=_QUEUE)
        self._log_failure = Sparingly(_log)
        self.not_freed_bytes = 0  #: Bytes that nobody needs and that are still there.

    def keep_used(self, offset: int, size: int) -> None:
        """Take off the account the pages of the range that are in use again."""
        if self.not_freed_bytes:
            for start, end in self._used_pages(offset, offset + size):
                self._settle(start, end)

    def free(self, offset: int, size: int) -> int:
        """Free a range; return the bytes of it that are on the account, to be freed later."""
        end = offset + size
        earlier = len(self._queue)
        if not self._free_range(offset, end):
            self._queue.append((offset, end))
        if earlier:
            self._retry(earlier)
        if not self.not_freed_bytes:
            return 0
        return self._pending.count(offset // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def free_pending(self) -> int:
        """Try once more to free all that waits; return the bytes that still wait."""
        self._queue.clear()  # the account knows all of it
        for start, end in list(self._unused(0, self._pending.length * PAGE_SIZE)):
            if not self._free_range(start, end):
                self._queue.append((start, end))
        return self.not_freed_bytes

    def _free_huge(self, start: int, end: int) -> bool:
        # Of a huge page at either end that is in use in part, our part waits for the rest of it.
        for run in complement(self._used_pages(start, end), start, end):
            self._wait(*run)
        unit, worked = self._page_size, True
        whole_start, whole_end = -(-start // unit) * unit, end // unit * unit
        for edge in sorted({start // unit * unit, (end - 1) // unit * unit}):
            inside = whole_start <= edge and edge + unit <= whole_end
            if not inside and next(self._used(edge, edge + unit), None) is None:
                worked = self._free(edge, edge + unit) and worked
        if whole_start < whole_end:
            worked = self._free(whole_start, whole_end) and worked
        return worked

    def _free(self, start: int, end: int) -> bool:
        # Whole pages; whether that worked.
        try:
            self._discard(start, end - start)
        except BaseException as error:
            # All of it, though nothing may have been there: nobody else knows this side.
            self._wait(start, end)
            if not isinstance(error, Exception):
                raise
            where = describe_range(start, end - start)
            self._log_failure("%s: %s is not freed yet: %s", self._name, where, error)
            return False
        if self.not_freed_bytes:
            self._settle(start, end)
        return True

    def _wait(self, start: int, end: int) -> None:
        self.not_freed_bytes += self._pending.set(start // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def _settle(self, start: int, end: int) -> None:
        freed = self._pending.clear(start // PAGE_SIZE, end // PAGE_SIZE)
        self.not_freed_bytes -= freed * PAGE_SIZE

    def _retry(self, waiting: int) -> None:
        for _ in range(min(_RETRIES, waiting)):
            start, end = self._queue.popleft()
            run = next(self._unused(start, end), None)
            if run is not None:
                if not self._free_range(*run):
                    self._queue.append(run)
                if run[1] < end:
                    self._queue.append((run[1], end))

    def _unused(self, start: int, end: int) -> Runs:
        # The part of a range that still waits: the rest is in use again, or was freed since.
        for first, last in self._pending.runs(start // PAGE_SIZE, end // PAGE_SIZE):
            run = first * PAGE_SIZE, last * PAGE_SIZE
            yield from complement(self._used_pages(*run), *run)

    def _used_pages(self, start: int, end: int) -> Runs:
        for first, last in self._used(start, end):
            yield first // PAGE_SIZE * PAGE_SIZE, -(-last // PAGE_SIZE) * PAGE_SIZE


class Sides:
    """The sides of one block, and freeing them together: for pages that are not used at all."""

    def __init__(
        self,
        manager: RamDiscardManager,
        attributes: Source | None,
        shared: SharedBacking,
        discard_private: Callable[[int, int], None],
    ) -> None:
        self._manager = manager
        self._attributes = () if attributes is None else (attributes,)
        #: For pages that stop being used as shared ones, and as private ones; None: no such side.
        self.shared: Reclaimer | None = None
        self.private: Reclaimer | None = None
        name, size, unit = f"block {manager.block.name!r}", manager.block.size, shared.page_size
        if is_in_place(shared):
            self._all = [Reclaimer(name, size, unit, shared.discard, partial(self._used, ""))]
            return
        side, used = f"{name}, shared side", partial(self._used, "shared")
        self.shared = Reclaimer(side, size, unit, shared.discard, used)
        self._all = [self.shared]
        if attributes is not None:
            side, used = f"{name}, private side", partial(self._used, "private")
            self.private = Reclaimer(side, size, PAGE_SIZE, discard_private, used)
            self._all.append(self.private)

    def _used(self, side: str, start: int, end: int) -> Runs:
        runs: Runs = iter(((start, end),))
        if side:
            runs = joint_runs(runs, self._attributes)
        if side == "private":
            runs = complement(runs, start, end)
        # Other sources are not asked: the guest may use pages that they withhold from devices.
        sources = [each for each in self._manager.sources if getattr(each, "withholds", False)]
        return joint_runs(runs, sources)

    @property
    def not_freed_bytes(self) -> int:
        """Bytes that nobody needs and that are still there."""
        return sum(side.not_freed_bytes for side in self._all)

    def free_pending(self) -> int:
        """Try once more to free everything that waits; return the bytes that still wait."""
        return free_each(side.free_pending for side in self._all)

    def free(self, offset: int, size: int) -> int:
        """Free a range that nobody needs any more; return the bytes that wait."""
        return free_each(partial(side.free, offset, size) for side in self._all)

    def keep_used(self, offset: int, size: int) -> None:
        """Take off the account the pages of the range that are in use again."""
        for side in self._all:
            side.keep_used(offset, size)
