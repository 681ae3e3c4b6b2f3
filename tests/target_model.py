"""
A naive model of a DMA target, page by page, and steps that are played to both.

The same steps run on the software IOMMU, on targets over a kernel that is made up, and in the lab
on the real ones, where a device says which pages it reaches.
"""

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from hypothesis import strategies as st

from ramblock import RamBlock
from ramblock.dma import DmaTarget, HostRange
from ramblock.errors import DmaError
from ramblock.units import PAGE_SIZE

__all__ = ["PAGES", "Cutting", "Step", "TargetModel", "play", "steps"]

#: Few pages, so that steps meet each other.
PAGES = 16


class Cutting(Enum):
    """What an unmap may name."""

    ANYTHING = "anything"
    """Parts of mappings too: SoftIommu(cut=True), iommufd when cutting."""
    WHOLE_MAPPINGS = "whole mappings"
    """Any number of them; bisecting is EINVAL and does nothing: type1."""
    ONE_MAPPING = "one mapping"
    """Exactly one; else ENOENT: iommufd in native mode, as its one user uses it."""


@dataclass(frozen=True)
class Step:
    map: bool
    first: int
    count: int
    writable: bool


def steps() -> st.SearchStrategy[list[Step]]:
    def of(first: int) -> st.SearchStrategy[Step]:
        return st.builds(
            Step, st.booleans(), st.just(first), st.integers(1, PAGES - first), st.booleans()
        )

    return st.lists(st.integers(0, PAGES - 1).flatmap(of), max_size=30)


class TargetModel:
    """Which mapping holds each page."""

    def __init__(self, cutting: Cutting) -> None:
        self.cutting = cutting
        self.holder: dict[int, int] = {}
        self.writable: dict[int, bool] = {}
        self._next = 0

    def play(self, step: Step) -> int:
        """Bytes removed, 0 for a map; or the errno, negative."""
        pages = range(step.first, step.first + step.count)
        touched = {self.holder[page] for page in pages if page in self.holder}
        if step.map:
            if touched:
                return -errno.EEXIST
            self._next += 1
            self.writable[self._next] = step.writable
            self.holder.update(dict.fromkeys(pages, self._next))
            return 0
        held = {page for page in self.holder if self.holder[page] in touched}
        if self.cutting is Cutting.WHOLE_MAPPINGS and not held <= set(pages):
            return -errno.EINVAL
        if self.cutting is Cutting.ONE_MAPPING and (len(touched) != 1 or not held <= set(pages)):
            return -errno.ENOENT
        removed = [page for page in pages if self.holder.pop(page, None) is not None]
        return len(removed) * PAGE_SIZE

    def names_one(self, step: Step) -> bool:
        """
        Whether *step* does not reach beyond one mapping.

        What happens then to several is the target's own business.
        """
        pages = set(range(step.first, step.first + step.count))
        touched = {self.holder[page] for page in pages if page in self.holder}
        held = {page for page in self.holder if self.holder[page] in touched}
        return step.map or not touched or (len(touched) == 1 and pages <= held)

    def reachable(self, page: int) -> bool:
        """Whether a device may write to *page*."""
        return page in self.holder and self.writable[self.holder[page]]


def play(
    target: DmaTarget,
    model: TargetModel,
    block: RamBlock,
    todo: Iterable[Step],
    base: int,
    reaches: Callable[[int], bool] | None = None,
) -> None:
    """
    Play *todo* to both and compare what they answer; unmaps everything at the end.

    :param base: IOVA of page 0.
    :param reaches: Whether a device can write to an IOVA.
    """
    for step in todo:
        if model.cutting is Cutting.ONE_MAPPING and not model.names_one(step):
            continue
        assert _do(target, block, step, base) == model.play(step), step
    if reaches is not None:
        for page in range(PAGES):
            assert reaches(base + page * PAGE_SIZE) == model.reachable(page), page
    for holder in sorted(set(model.holder.values())):
        # Under the same holder when pages were cut out: those are not mapped, and one call would
        # name them too.
        pages = [page for page in model.holder if model.holder[page] == holder]
        removed = sum(
            target.unmap(base + first * PAGE_SIZE, count * PAGE_SIZE)
            for first, count in _runs(pages)
        )
        assert removed == len(pages) * PAGE_SIZE


def _do(target: DmaTarget, block: RamBlock, step: Step, base: int) -> int:
    offset, size = step.first * PAGE_SIZE, step.count * PAGE_SIZE
    try:
        if step.map:
            memory = HostRange(block.fd, offset, block.address + offset, size)
            target.map(base + offset, memory, writable=step.writable)
            return 0
        return target.unmap(base + offset, size)
    except DmaError as error:
        named = (error.iova, error.size) == (base + offset, size)
        return -(error.errno or 0) if named else -errno.EPROTO


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and sum(runs[-1]) == page:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs
