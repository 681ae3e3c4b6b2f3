# SPDX-License-Identifier: Apache-2.0
"""
Freeing one side of a block, with an account of what could not be freed.

Freeing comes after the commit: a failure cannot undo anything, so it is noted and tried again when something else is freed.
Huge pages are freed whole: a part that nobody needs waits, accounted, until the rest of its huge page is not needed
either (QEMU skips hugetlbfs here, and holds such memory twice).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from itertools import islice

from ramblock.bitmap import SparseBitmap
from ramblock.errors import describe_range
from ramblock.units import PAGE_SIZE

__all__ = ["Reclaimer"]

_log = logging.getLogger(__name__)

# How many earlier failures one call tries again: the work of a request must not grow with the guest's history.
_RETRIES = 4


class Reclaimer:
    """
    Frees one side of one block.

    :param name: For messages: which side of which block.
    :param size: Of the block, in bytes.
    :param page_size: What can be freed at once, in bytes.
    :param discard: Frees whole pages of it; raises on failure.
    :param needed: Whether any part of a page is in use on this side.
    """

    def __init__(
        self,
        name: str,
        size: int,
        page_size: int,
        discard: Callable[[int, int], None],
        needed: Callable[[int, int], bool],
    ) -> None:
        self._name = name
        self._page_size = page_size
        self._discard = discard
        self._needed = needed
        self._pending = SparseBitmap(size // PAGE_SIZE)
        self._failed: deque[tuple[int, int]] = deque()
        #: Bytes that nobody needs and that are still there.
        self.not_freed_bytes = 0

    def keep(self, offset: int, size: int) -> None:
        """Take the range off the account: it is in use again, and must not be freed."""
        if self.not_freed_bytes:
            self._settle(offset, offset + size)

    def free(self, offset: int, size: int) -> int:
        """
        Free ``[offset, offset + size)``, which nobody needs any more.

        :return: How many bytes of it are not freed now; they are on the account and freed later.
        :raises BaseException: Only an interrupt; the range is on the account then.
        """
        end = offset + size
        if self._page_size == PAGE_SIZE:
            self._free(offset, end)
        else:
            self._free_huge(offset, end)
        if self._failed:
            self._retry()
        if not self.not_freed_bytes:
            return 0
        return self._pending.count(offset // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def free_pending(self) -> int:
        """
        Try once more to free everything that waits.

        :return: Bytes that still wait, among them the parts of huge pages that are partly in use.
        """
        for _ in range(len(self._failed)):
            self._retry()
        return self.not_freed_bytes

    def _free(self, start: int, end: int) -> None:
        """Free whole pages of this side; on failure note them."""
        try:
            self._discard(start, end - start)
        except BaseException as error:
            self._wait(start, end)
            self._failed.append((start, end))
            _log.warning(
                "%s: %s is not freed yet: %s", self._name, describe_range(start, end - start), error
            )
            if not isinstance(error, Exception):
                raise
        else:
            if self.not_freed_bytes:
                self._settle(start, end)

    def _free_huge(self, start: int, end: int) -> None:
        unit = self._page_size
        self._wait(start, end)
        whole_start, whole_end = -(-start // unit) * unit, end // unit * unit
        edges = {start // unit * unit, (end - 1) // unit * unit}
        for edge in sorted(edges):
            inside = whole_start <= edge and edge + unit <= whole_end
            if not inside and not self._needed(edge, unit):
                self._free(edge, edge + unit)
        if whole_start < whole_end:
            self._free(whole_start, whole_end)

    def _wait(self, start: int, end: int) -> None:
        self.not_freed_bytes += self._pending.set(start // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE

    def _settle(self, start: int, end: int) -> None:
        self.not_freed_bytes -= (
            self._pending.clear(start // PAGE_SIZE, end // PAGE_SIZE) * PAGE_SIZE
        )

    def _retry(self) -> None:
        for _ in range(min(_RETRIES, len(self._failed))):
            start, end = self._failed.popleft()
            # Only what still waits: the rest has come back into use, or was freed since.
            runs = self._pending.runs(start // PAGE_SIZE, end // PAGE_SIZE)
            for run_start, run_end in islice(runs, _RETRIES):
                self._free_waiting(run_start * PAGE_SIZE, run_end * PAGE_SIZE)
                done = run_end * PAGE_SIZE
                if done < end and self._pending.count(done // PAGE_SIZE, end // PAGE_SIZE):
                    self._failed.append((done, end))
                    break

    def _free_waiting(self, start: int, end: int) -> None:
        if self._page_size == PAGE_SIZE:
            self._free(start, end)
        else:
            self._free_huge(start, end)
