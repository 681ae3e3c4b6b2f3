# SPDX-License-Identifier: Apache-2.0
"""A naive model of a DMA target: the mapping that holds each page, and where it leads."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import strategies as st

from ramblock.dma.target import DmaCapabilities
from ramblock.testing.conformance.exploring import sequences

__all__ = ["PAGES", "Answer", "Step", "TargetModel", "steps"]

#: Few pages, so that steps meet each other.
PAGES = 16


@dataclass(frozen=True, slots=True)
class Step:
    """A map or an unmap, in pages."""

    map: bool
    first: int
    count: int
    memory: int = 0
    """Of a map: the first page of the memory that it leads to."""
    writable: bool = True


def steps() -> st.SearchStrategy[list[Step]]:
    """Give sequences of steps on :data:`PAGES` pages."""
    page = st.integers(0, PAGES - 1)

    def make(is_map: bool, ends: tuple[int, int], memory: int, writable: bool) -> Step:  # noqa: FBT001
        first, count = min(ends), max(ends) - min(ends) + 1
        return Step(is_map, first, count, min(memory, PAGES - count), writable)

    step = st.builds(make, st.booleans(), st.tuples(page, page), page, st.booleans())
    return sequences(step, 30)


class Answer(NamedTuple):
    """What a target may answer to a step."""

    removed: int | None
    """Pages that an unmap removes, 0 for a map; None: it has to refuse."""
    refusals: frozenset[int] = frozenset()
    """With which errno it may, or has to, refuse."""


class _Mapping(NamedTuple):
    number: int
    shift: int
    """From a page to that of the memory behind it."""
    writable: bool


class TargetModel:
    """
    What ought to be mapped.

    What an unmap may name follows from the capabilities: parts of mappings (*cut*), exactly one
    whole mapping (*exact*), or else any number of whole ones.
    """

    def __init__(self, capabilities: DmaCapabilities) -> None:
        self._cut = capabilities.cut and not capabilities.exact
        self._exact = capabilities.exact
        self._limit = capabilities.max_mappings
        self._pages: dict[int, _Mapping] = {}
        self._made = 0

    def expect(self, step: Step) -> Answer:
        """Say what the target may answer, given what is mapped."""
        touched, sticks_out = self._touched(step)
        if step.map:
            refusals = set()
            if touched:
                refusals.add(errno.EEXIST)
            if self._limit is not None and len(self.mappings()) >= self._limit:
                refusals.add(errno.ENOSPC)
            return Answer(None if refusals else 0, frozenset(refusals))
        if self._exact and (len(touched) != 1 or sticks_out):
            return Answer(None, frozenset({errno.ENOENT}))
        if sticks_out and not self._cut:
            return Answer(None, frozenset({errno.EINVAL}))
        removed = sum(page in self._pages for page in _range(step))
        if self._limit is not None and self._entries_after(step) > self._limit:
            # Two pieces of one mapping: the reference leaves it open, the mapper never asks for it.
            return Answer(removed, frozenset({errno.ENOSPC}))
        return Answer(removed)

    def apply(self, step: Step) -> None:
        """Do what the target did."""
        if step.map:
            self._made += 1
            mapping = _Mapping(self._made, step.memory - step.first, step.writable)
            self._pages.update(dict.fromkeys(_range(step), mapping))
        else:
            for page in _range(step):
                self._pages.pop(page, None)

    def is_settled(self, step: Step) -> bool:
        """
        Whether the reference says how *step* ends.

        An exact target may meet several mappings in a range and stop half-way (an iommufd IOAS
        does, and says ``in_doubt``).
        """
        touched, _ = self._touched(step)
        beyond = any(page not in self._pages for page in _range(step))
        return step.map or not self._exact or not touched or (len(touched) == 1 and not beyond)

    def _touched(self, step: Step) -> tuple[set[int], bool]:
        """Which mappings *step* meets, and whether any of them has pages outside of it."""
        inside = set(_range(step))
        touched = {self._pages[page].number for page in inside if page in self._pages}
        return touched, any(
            mapping.number in touched and page not in inside
            for page, mapping in self._pages.items()
        )

    def _entries_after(self, step: Step) -> int:
        after = dict(self._pages)
        for page in _range(step):
            after.pop(page, None)
        return len(_runs(after))

    def memory_of(self, page: int) -> tuple[int, bool] | None:
        """Tell the page of memory behind *page*, and whether it is writable; None: not mapped."""
        mapping = self._pages.get(page)
        return None if mapping is None else (page + mapping.shift, mapping.writable)

    def mappings(self) -> list[tuple[int, int]]:
        """List the mappings, as (first page, pages); a mapping that was cut is several."""
        return _runs(self._pages)


def _range(step: Step) -> range:
    return range(step.first, step.first + step.count)


def _runs(pages: dict[int, _Mapping]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    last: _Mapping | None = None
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page and pages[page] == last:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
        last = pages[page]
    return runs
