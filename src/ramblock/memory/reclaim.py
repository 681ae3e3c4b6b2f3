# SPDX-License-Identifier: Apache-2.0
"""
Freeing one side of a block, with an account of what could not be freed.

Freeing comes after the commit: a failure cannot undo anything, so it stays on the account, where it was put before the
commit, and is tried again when something else is freed.
Huge pages are freed whole: a part that nobody needs waits, accounted, until the rest of its huge page is not needed
either (QEMU skips hugetlbfs here, and holds such memory twice).

What waits may come into use again in many ways (a conversion, a plug, a source that comes, goes or changes its mind). So
what is in use is not remembered but asked, each time before something that has waited is freed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from ramblock.bitmap import SparseBitmap
from ramblock.errors import describe_range
from ramblock.logs import Sparingly
from ramblock.memory.runs import Runs, complement
from ramblock.units import PAGE_SIZE

__all__ = ["Reclaimer"]

_log = logging.getLogger(__name__)

# How many earlier failures one call tries again: the work of a request must not grow with the guest's history.
_RETRIES = 4
# How many failures are remembered for that; older ones stay on the account, and free_pending() finds them there.
_QUEUE = 1024


class Reclaimer:
    """
    Frees one side of one block.

    :param name: For messages: which side of which block.
    :param size: Of the block, in bytes.
    :param page_size: What can be freed at once, in bytes.
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
        # What is being freed, or is to be tried again.
        self._queue: deque[tuple[int, int]] = deque(maxlen=_QUEUE)
        self._log_failure = Sparingly(_log)
        #: Bytes that nobody needs and that are still there.
        self.not_freed_bytes = 0

    def keep_used(self, offset: int, size: int) -> None:
        """Take off the account what of the range is in use again."""
        if self.not_freed_bytes:
            for start, end in self._used_pages(offset, offset + size):
                self._settle(start, end)

    def expect(self, offset: int, size: int) -> None:
        """
        Put what is in use of ``[offset, offset + size)`` on the account: it is about to be of no use on this side.

        Called before the commit, so that an interrupt between the commit and :meth:`free` loses nothing.
        :meth:`unexpect` takes it back.
        """
        for start, end in self._used_pages(offset, offset + size):
            self._wait(start, end)
        self._queue.append((offset, offset + size))

    def unexpect(self, offset: int, size: int) -> None:
        """Undo :meth:`expect`, whether it happened or not: all is in use as before."""
        self.keep_used(offset, size)
        end = offset + size
        waiting = self._pending.count(offset // PAGE_SIZE, end // PAGE_SIZE)
        if not waiting and self._queue and self._queue and self._queue[-1] == (offset, end):
            self._queue.pop()

    def free(self, offset: int, size: int) -> int:
        """
        Free ``[offset, offset + size)``, which :meth:`expect` was told of and nobody needs any more.

        :return: How many bytes of it are not freed now; they are on the account and freed later.
        :raises BaseException: Only an interrupt; the range is on the account then.
        """
        end = offset + size
        earlier = len(self._queue) - 1
        # It is not the last when more than one range was expected; then a later call finds nothing left of it.
        if self._free_pages(offset, end) and self._queue and self._queue[-1] == (offset, end):
            self._queue.pop()
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

    def _free(self, start: int, end: int) -> bool:
        """Free whole pages of this side; whether that worked."""
        try:
            self._discard(start, end - start)
        except BaseException as error:
            # All of it, though nothing may have been there: what is on this side is not known to anybody else.
            self._wait(start, end)
            if not isinstance(error, Exception):
                raise
            self._log_failure(
                "%s: %s is not freed yet: %s", self._name, describe_range(start, end - start), error
            )
            return False
        self._settle(start, end)
        return True

    def _free_huge(self, start: int, end: int) -> bool:
        """Free the huge pages of which nothing is in use; the rest stays on the account. Whether that worked."""
        unit = self._page_size
        worked = True
        whole_start, whole_end = -(-start // unit) * unit, end // unit * unit
        edges = {start // unit * unit, (end - 1) // unit * unit}
        for edge in sorted(edges):
            inside = whole_start <= edge and edge + unit <= whole_end
            if not inside and next(self._used(edge, edge + unit), None) is None:
                worked = self._free(edge, edge + unit) and worked
        if whole_start < whole_end:
            worked = self._free(whole_start, whole_end) and worked
        return worked

    def _wait(self, start: int, end: int) -> None:
        self.not_freed_bytes += self._pending.set(start // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def _settle(self, start: int, end: int) -> None:
        self.not_freed_bytes -= (
            self._pending.clear(start // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE
        )

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

    def _free_pages(self, start: int, end: int) -> bool:
        if self._page_size == PAGE_SIZE:
            return self._free(start, end)
        return self._free_huge(start, end)
