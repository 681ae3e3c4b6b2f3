# SPDX-License-Identifier: Apache-2.0
"""A discard source that is a bitmap, and one change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.discard.manager import ManagedBlock
from ramblock.discard.notification import Notification, reserve
from ramblock.discard.undo import UndoLog
from ramblock.process import OfOneProcess
from ramblock.ranges import Runs


class BitmapSource(OfOneProcess):
    """One bit per granule of a block, a power of two of bytes; set means populated."""

    def __init__(self, block: ManagedBlock, granularity: int) -> None:
        self.block = block
        #: For messages.
        self.place = f"block {block.name!r}"
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.bits = SparseBitmap(block.size >> self.shift)

    @property
    def populated_bytes(self) -> int:
        """The size of all that is populated, in bytes."""
        # Counted each time: a conversion of two sections of the block flips two changes of it.
        return self.bits.count(0, self.bits.length) << self.shift

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether all of ``[offset, offset + size)`` is populated; any alignment."""
        start, end = offset >> self.shift, ((offset + size - 1) >> self.shift) + 1
        return self.bits.count(start, end) == end - start

    def ranges(self, offset: int, size: int, /) -> Iterator[tuple[int, int]]:
        """Yield the populated runs in ``[offset, offset + size)`` as (offset, size), ascending."""
        shift, limit = self.shift, offset + size
        for start, end in self.bits.runs(offset >> shift, ((limit - 1) >> shift) + 1):
            low, high = max(start << shift, offset), min(end << shift, limit)
            yield low, high - low

    def plan(self, offset: int, size: int, *, populate: bool) -> BitmapChange | None:
        """Build the change of a range of whole granules; None: it changes nothing."""
        start, end = offset >> self.shift, (offset + size) >> self.shift
        populated = self.bits.count(start, end)
        changed = end - start - populated if populate else populated
        return BitmapChange(self, start, end, changed, populate=populate) if changed else None

    def change(self, operation: str, change: BitmapChange) -> None:
        """Tell the listeners, then change the bits: all or nothing, whatever is raised."""
        manager, notification = self.block.discard_manager, change.notification
        if manager.registry.limited:
            reserve((notification,))
        with UndoLog(manager.guard, operation) as undo:
            undo.do("notify", notification.tell, notification.take_back)
            # Where the bits cannot be put back the listeners stay told.
            undo.do("state", change.flip, change.flip_back, stuck=change.flip)


class BitmapChange:
    """
    A range of a bitmap source, in bits, of which *changed* become populated or discarded.

    Listeners first, then the bits: the state stays until everybody has agreed. The notification
    takes the source at its word meanwhile.
    """

    __slots__ = ("_span", "changed_bytes", "notification", "populate", "saved", "source")

    def __init__(
        self, source: BitmapSource, start: int, end: int, changed: int, *, populate: bool
    ) -> None:
        shift = source.shift
        self.source = source
        self.populate = populate
        self.changed_bytes = changed << shift
        #: The bits before, where some of the range is in the new state already; else None.
        self.saved: SavedBits | None = None
        runs: Callable[[int, int], Runs] | None = None
        hollow = True
        if changed < end - start:
            span = source.bits.span(start, end, value=not populate)
            assert span is not None  # something changes, so something has the other value
            start, end = span
            self.saved = source.bits.save(start, end)
            runs, hollow = self._runs, not populate
        self._span = start, end
        manager, start, end = source.block.discard_manager, start << shift, end << shift
        self.notification = Notification(
            manager, start, end, populate=populate, source=source, runs=runs, hollow=hollow
        )

    # This and the next yield whole granules, and only while the bits are as they were.
    def _runs(self, start: int, end: int) -> Runs:
        shift = self.source.shift
        first, last = start >> shift, ((end - 1) >> shift) + 1
        for low, high in self.source.bits.runs(first, last, value=not self.populate):
            yield low << shift, high << shift

    def changed_runs(self) -> Runs:
        """Yield all that changes as (start, end), in bytes, ascending."""
        start, end = (bit << self.source.shift for bit in self._span)
        return iter(((start, end),)) if self.saved is None else self._runs(start, end)

    def flip(self) -> None:
        """Change the bits, wherever they were left."""
        bits, (start, end) = self.source.bits, self._span
        if self.populate:
            bits.set(start, end)
        else:
            bits.clear(start, end)

    def flip_back(self) -> None:
        """Undo :meth:`flip`, whether it happened, half happened or did not."""
        bits, (start, end) = self.source.bits, self._span
        if self.saved is not None:
            bits.restore(start, end, self.saved)
        elif self.populate:
            bits.clear(start, end)
        else:
            bits.set(start, end)
