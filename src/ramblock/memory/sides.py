# SPDX-License-Identifier: Apache-2.0
"""
The memory of a block by side: what a change leaves unused, and freeing it.

A page of a confidential block has a shared and a private side, and each is used in one state. Ordinary RAM has the shared
side alone. In place one memory serves both states, so that a page is unused only when it is used in neither.

::

    a page stops being used   as shared       as private      at all (unplugged)
      split                   shared side     private side    both sides
      ordinary                shared side     -               shared side
      in place                -               -               the memory

All of it runs under the memory's lock, which the caller holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramblock.memory.backing import PrivateBacking, SharedBacking
from ramblock.memory.bitmap_source import BitmapSource
from ramblock.memory.reclaim import Reclaimer
from ramblock.memory.runs import Runs, complement, intersect, merge_adjacent
from ramblock.units import PAGE_SIZE

if TYPE_CHECKING:
    from ramblock.memory.block import RamBlock

__all__ = ["Side", "Sides"]


class Side:
    """What is freed when pages stop being used in one way: one reclaimer, several, or none."""

    __slots__ = ("_reclaimers",)

    def __init__(self, *reclaimers: Reclaimer) -> None:
        self._reclaimers = reclaimers

    @property
    def not_freed_bytes(self) -> int:
        """Bytes that nobody needs and that are still there."""
        return sum(reclaimer.not_freed_bytes for reclaimer in self._reclaimers)

    def free_pending(self) -> int:
        """Try once more to free everything that waits; return the bytes that still wait."""
        return sum(reclaimer.free_pending() for reclaimer in self._reclaimers)

    def expect(self, offset: int, size: int) -> None:
        """Put what a commit will leave unused on the account."""
        for reclaimer in self._reclaimers:
            reclaimer.expect(offset, size)

    def unexpect(self, offset: int, size: int) -> None:
        """Undo :meth:`expect`."""
        for reclaimer in self._reclaimers:
            reclaimer.unexpect(offset, size)

    def free(self, offset: int, size: int) -> int:
        """
        Free what :meth:`expect` was told of, once that is so; return the bytes not freed.

        :raises BaseException: Only an interrupt, after every reclaimer had its turn.
        """
        not_freed = 0
        interrupt: BaseException | None = None
        for reclaimer in self._reclaimers:
            try:
                not_freed += reclaimer.free(offset, size)
            except BaseException as error:  # the other side must not be lost either
                interrupt = error
        if interrupt is not None:
            raise interrupt
        return not_freed

    def keep_used(self, offset: int, size: int) -> None:
        """After a change: what is in use again does not wait to be freed any more."""
        for reclaimer in self._reclaimers:
            reclaimer.keep_used(offset, size)


class Sides:
    """
    The sides of one block.

    :param block: Whose sources say what is in use.
    :param shared: Its shared backing.
    :param private: Its private backing; the same object in place, None for ordinary RAM.
    """

    __slots__ = ("_block", "both", "private", "shared")

    def __init__(
        self, block: RamBlock, shared: SharedBacking, private: PrivateBacking | None
    ) -> None:
        self._block = block
        #: For pages that stop being used as shared ones.
        self.shared = Side()
        #: For pages that stop being used as private ones.
        self.private = Side()
        #: For pages that stop being used at all.
        self.both: Side
        name, size, unit = f"block {block.name!r}", block.size, shared.page_size
        if block.in_place is not None:
            self.both = Side(Reclaimer(name, size, unit, shared.discard, self._plugged))
            return
        of_shared = Reclaimer(f"{name}, shared side", size, unit, shared.discard, self._used_shared)
        self.shared = self.both = Side(of_shared)
        if private is not None:
            of_private = Reclaimer(
                f"{name}, private side", size, PAGE_SIZE, private.discard, self._used_privately
            )
            self.private = Side(of_private)
            self.both = Side(of_shared, of_private)

    def _plugged(self, start: int, end: int) -> Runs:
        """Yield what is plugged: all of it, unless virtio-mem has a say."""
        return self._plugged_of(iter(((start, end),)))

    def _plugged_of(self, runs: Runs) -> Runs:
        """Other sources are not asked: what they withhold from devices the guest may still use."""
        attributes = self._block.attributes
        for source in self._block.discard_manager.sources:
            if isinstance(source, BitmapSource) and source is not attributes:
                runs = intersect(runs, source)
        return merge_adjacent(runs)

    def _used_shared(self, start: int, end: int) -> Runs:
        """Yield what is in use on the shared side: shared, and plugged."""
        runs: Runs = iter(((start, end),))
        attributes = self._block.attributes
        if attributes is not None:
            runs = intersect(runs, attributes)
        return self._plugged_of(runs)

    def _used_privately(self, start: int, end: int) -> Runs:
        """Yield what is in use on the private side: private, and plugged."""
        attributes = self._block.attributes
        assert attributes is not None  # the caller has a private side
        shared = ((offset, offset + size) for offset, size in attributes.ranges(start, end - start))
        return self._plugged_of(complement(shared, start, end))
