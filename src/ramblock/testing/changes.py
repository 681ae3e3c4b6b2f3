# SPDX-License-Identifier: Apache-2.0
"""
Pages that became private while an access of a device was under way.

The access may have reached them before, rightly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from threading import get_ident

from ramblock.testing.marks import Stretches

__all__ = ["Changes"]

# How many are kept before anybody asks which of them can be forgotten.
_KEPT = 4096


class Changes:
    """The latest changes to private, numbered. The caller locks."""

    def __init__(self) -> None:
        self._count = 0
        self._latest: deque[tuple[int, int]] = deque()
        # The count when each thread last began an access: no older change is asked for any more.
        self._stamps: dict[int, int] = {}

    def add(self, stretches: Stretches) -> None:
        """Note stretches that become private and were not."""
        for stretch in stretches:
            self._count += 1
            self._latest.append(stretch)
        if len(self._latest) > _KEPT:
            oldest = min(self._stamps.values(), default=self._count)
            while self._count - len(self._latest) < oldest:
                self._latest.popleft()

    def stamp(self) -> int:
        """Count the changes so far, before an access of the calling thread."""
        self._stamps[get_ident()] = self._count
        return self._count

    def without_those_since(
        self, stretches: Iterable[tuple[int, int]], stamp: int
    ) -> list[tuple[int, int]]:
        """Cut out of *stretches* what has become private since *stamp*."""
        left = list(stretches)
        if left:
            for start, end in islice(reversed(self._latest), self._count - stamp):
                left = list(_without(left, start, end))
        return left

    def __len__(self) -> int:
        return len(self._latest)


def _without(stretches: Iterable[tuple[int, int]], start: int, end: int) -> Stretches:
    """Yield the parts of *stretches* outside of [start, end)."""
    for low, high in stretches:
        if low < min(start, high):
            yield low, min(start, high)
        if max(end, low) < high:
            yield max(end, low), high
