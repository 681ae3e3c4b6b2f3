# SPDX-License-Identifier: Apache-2.0
"""
Freeing the memory of a block, with an account of what could not be freed.

A page of a confidential block has a shared and a private side, and each is used in one state. Ordinary
RAM has the shared side alone. In place one memory serves both states, so that a page is unused only
when it is used in neither::

    a page stops being used   as shared       as private      at all (unplugged)
      split                   shared side     private side    both sides
      ordinary                shared side     -               shared side
      in place                -               -               the memory

Freeing comes after the commit: a failure cannot undo anything, so it goes on the account and is tried
again when something else is freed. Huge pages are freed whole: a part that nobody needs waits,
accounted, until the rest of its huge page is not needed either (QEMU skips hugetlbfs here, and holds
such memory twice).

Memory that waits may come into use again in many ways (a conversion, a plug, a source that comes, goes
or changes its mind). So its use is not remembered but asked, each time before anything is freed.
All of it runs under the memory's lock, which the caller holds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from ramblock.bitmap import SparseBitmap
from ramblock.discard.manager import RamDiscardManager
from ramblock.discard.sources import Source, joint_runs
from ramblock.errors import describe_range
from ramblock.hostmem.backing import SharedBacking
from ramblock.hostmem.in_place import is_in_place
from ramblock.logs import Sparingly
from ramblock.ranges import Runs, complement
from ramblock.units import PAGE_SIZE

__all__ = ["Reclaimer", "Several", "Sides", "free_each", "sides_of"]

_log = logging.getLogger(__name__)

# How many earlier failures one call tries again: the work of a request must not grow with the
# guest's history.
_RETRIES = 4
# How many failures are remembered for that; older ones stay on the account, and free_pending()
# finds them there.
_QUEUE = 1024


def free_each(frees: Iterable[Callable[[], int]]) -> int:
    """
    Call each of *frees* and add up the bytes that are not freed.

    :raises BaseException: The last one that is no Exception, after all had their turn: memory whose
        turn never came would be lost. (Refusals are on the account, and raise nothing.)
    """
    not_freed = 0
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

    :param name: For messages: which side of which block.
    :param size: Of the block, in bytes.
    :param page_size: The smallest piece that can be freed, in bytes.
    :param discard: Frees whole pages of it; raises on failure.
    :param used: The runs inside [start, end) that are in use on this side, ascending.
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
        self._discard = discard
        self._used = used
        self._pending = SparseBitmap(size // PAGE_SIZE)
        self._queue: deque[tuple[int, int]] = deque(maxlen=_QUEUE)
        self._log_failure = Sparingly(_log)
        #: Bytes that nobody needs and that are still there.
        self.not_freed_bytes = 0

    def keep_used(self, offset: int, size: int) -> None:
        """Take off the account what of the range is in use again."""
        if self.not_freed_bytes:
            for start, end in self._used_pages(offset, offset + size):
                self._settle(start, end)

    def free(self, offset: int, size: int) -> int:
        """
        Free ``[offset, offset + size)``, which nobody needs any more.

        :return: How many bytes of it are not freed now; they are on the account and freed later.
        :raises BaseException: What the backing raised, if it is no Exception; the range is on the
            account then.
        """
        end = offset + size
        earlier = len(self._queue)
        small = self._page_size == PAGE_SIZE
        if not (self._free(offset, end) if small else self._free_pages(offset, end)):
            self._queue.append((offset, end))
        if earlier:
            self._retry(earlier)
        if not self.not_freed_bytes:
            return 0
        return self._pending.count(offset // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def free_pending(self) -> int:
        """
        Try once more to free everything that waits.

        :return: Bytes that still wait, among them the parts of huge pages that are partly in use.
        """
        self._queue.clear()  # the account knows all of it
        for start, end in list(self._unused(0, self._pending.length * PAGE_SIZE)):
            if not self._free_pages(start, end):
                self._queue.append((start, end))
        return self.not_freed_bytes

    def _free_pages(self, start: int, end: int) -> bool:
        """Free a range, as far as it goes; whether nothing failed."""
        unit = self._page_size
        if unit == PAGE_SIZE:
            return self._free(start, end)
        # Of a huge page at either end that is in use in part, our part waits for the rest of it.
        for run in complement(self._used_pages(start, end), start, end):
            self._wait(*run)
        worked = True
        whole_start, whole_end = -(-start // unit) * unit, end // unit * unit
        for edge in sorted({start // unit * unit, (end - 1) // unit * unit}):
            inside = whole_start <= edge and edge + unit <= whole_end
            if not inside and next(self._used(edge, edge + unit), None) is None:
                worked = self._free(edge, edge + unit) and worked
        if whole_start < whole_end:
            worked = self._free(whole_start, whole_end) and worked
        return worked

    def _free(self, start: int, end: int) -> bool:
        """Free whole pages of this side; whether that worked."""
        try:
            self._discard(start, end - start)
        except BaseException as error:
            # All of it, though nothing may have been there: nobody else knows what is on this side.
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
        """Try again the oldest of the *waiting* failures, one run of each."""
        for _ in range(min(_RETRIES, waiting)):
            start, end = self._queue.popleft()
            run = next(self._unused(start, end), None)
            if run is None:
                continue
            if not self._free_pages(*run):
                self._queue.append(run)
            if run[1] < end:
                self._queue.append((run[1], end))

    def _unused(self, start: int, end: int) -> Runs:
        """Yield what still waits of a range: the rest has come back into use, or was freed since."""
        for first, last in self._pending.runs(start // PAGE_SIZE, end // PAGE_SIZE):
            run = first * PAGE_SIZE, last * PAGE_SIZE
            yield from complement(self._used_pages(*run), *run)

    def _used_pages(self, start: int, end: int) -> Runs:
        for first, last in self._used(start, end):
            yield first // PAGE_SIZE * PAGE_SIZE, -(-last // PAGE_SIZE) * PAGE_SIZE


class Several:
    """Reclaimers of several sides, or of none."""

    __slots__ = ("_reclaimers",)

    def __init__(self, *reclaimers: Reclaimer) -> None:
        self._reclaimers = reclaimers

    @property
    def not_freed_bytes(self) -> int:
        """Bytes that nobody needs and that are still there."""
        return sum(reclaimer.not_freed_bytes for reclaimer in self._reclaimers)

    def free_pending(self) -> int:
        """Try once more to free everything that waits; return the bytes that still wait."""
        return free_each(reclaimer.free_pending for reclaimer in self._reclaimers)

    def free(self, offset: int, size: int) -> int:
        """Free a range that nobody needs any more on this side; return the bytes that wait."""
        return free_each(partial(reclaimer.free, offset, size) for reclaimer in self._reclaimers)

    def keep_used(self, offset: int, size: int) -> None:
        """After a change: what is in use again does not wait to be freed any more."""
        for reclaimer in self._reclaimers:
            reclaimer.keep_used(offset, size)


class Sides(NamedTuple):
    """The sides of one block."""

    shared: Reclaimer | Several
    """For pages that stop being used as shared ones."""
    private: Reclaimer | Several
    """For pages that stop being used as private ones."""
    both: Reclaimer | Several
    """For pages that stop being used at all."""


def sides_of(
    manager: RamDiscardManager,
    attributes: Source | None,
    shared: SharedBacking,
    discard_private: Callable[[int, int], None] | None,
) -> Sides:
    """
    Make the sides of a block.

    :param manager: Whose sources say what is in use.
    :param attributes: The source that knows which pages are shared; None: all are.
    :param shared: The shared backing.
    :param discard_private: Frees pages of the private backing; None: there is none.
    """

    def plugged_of(runs: Runs) -> Runs:
        # Other sources are not asked: the guest may still use what they withhold from devices.
        return joint_runs(
            runs, [source for source in manager.sources if getattr(source, "withholds", False)]
        )

    def plugged(start: int, end: int) -> Runs:
        return plugged_of(iter(((start, end),)))

    def used_shared(start: int, end: int) -> Runs:
        runs: Runs = iter(((start, end),))
        return plugged_of(runs if attributes is None else joint_runs(runs, (attributes,)))

    def used_privately(start: int, end: int) -> Runs:
        assert attributes is not None  # there is a private side
        runs = joint_runs(iter(((start, end),)), (attributes,))
        return plugged_of(complement(runs, start, end))

    block, unit = manager.block, shared.page_size
    name, size = f"block {block.name!r}", block.size
    if is_in_place(shared):
        memory = Reclaimer(name, size, unit, shared.discard, plugged)
        return Sides(Several(), Several(), memory)
    of_shared = Reclaimer(f"{name}, shared side", size, unit, shared.discard, used_shared)
    if discard_private is None:
        return Sides(of_shared, Several(), of_shared)
    of_private = Reclaimer(
        f"{name}, private side", size, PAGE_SIZE, discard_private, used_privately
    )
    return Sides(of_shared, of_private, Several(of_shared, of_private))
