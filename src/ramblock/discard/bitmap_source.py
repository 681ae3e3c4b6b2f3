# SPDX-License-Identifier: Apache-2.0
"""A discard source that is a bitmap, and one change of it: page attributes and virtio-mem are two."""

from __future__ import annotations

from collections.abc import Iterator

from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.discard.manager import ManagedBlock
from ramblock.discard.notification import Notification, reserve
from ramblock.discard.undo import Entry, put_back
from ramblock.errors import describe_range
from ramblock.process import OfOneProcess
from ramblock.ranges import Runs

__all__ = ["BitmapChange", "BitmapSource"]


class BitmapSource(OfOneProcess):
    """
    One bit per granule of a block; set means populated.

    :param block: The block it speaks of.
    :param granularity: In bytes; a power of two that divides the block's size.
    """

    def __init__(self, block: ManagedBlock, granularity: int) -> None:
        self.block = block
        #: For messages.
        self.place = f"block {block.name!r}"
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.bits = SparseBitmap(block.size >> self.shift)

    @property
    def populated_bytes(self) -> int:
        """How much is populated, in bytes: counted, since several changes can be under way at once."""
        return self.bits.count(0, self.bits.length) << self.shift

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether all of ``[offset, offset + size)`` is populated; any alignment."""
        return self.bits.all(offset >> self.shift, ((offset + size - 1) >> self.shift) + 1)

    def ranges(self, offset: int, size: int, /) -> Iterator[tuple[int, int]]:
        """Yield the populated runs in ``[offset, offset + size)`` as (offset, size), ascending."""
        shift, limit = self.shift, offset + size
        for start, end in self.bits.runs(offset >> shift, ((limit - 1) >> shift) + 1):
            low, high = max(start << shift, offset), min(end << shift, limit)
            yield low, high - low

    def plan(self, offset: int, size: int, *, populate: bool) -> BitmapChange | None:
        """Find out what would change in a range of whole granules; None: nothing."""
        start, end = offset >> self.shift, (offset + size) >> self.shift
        populated = self.bits.count(start, end)
        changed = end - start - populated if populate else populated
        return BitmapChange(self, start, end, changed, populate=populate) if changed else None

    def change(self, operation: str, change: BitmapChange) -> None:
        """
        Tell the listeners, then change the bits: all or nothing.

        :raises MappingLimitError: A mapper has no room for it; nothing has changed.
        :raises Exception: Whatever a listener raised when it refused; nothing has changed.
        """
        manager = self.block.discard_manager
        if manager.registry.limited:
            reserve((change.notification,))
        notification = change.notification
        # As with an UndoLog, without its four calls.
        begun: list[Entry] = [("notify", None, notification.take_back, None, ())]
        try:
            notification.tell()
            # Where the bits cannot be put back the listeners stay told.
            begun.append(("state", None, change.flip_back, change.flip, ()))
            change.flip()
        except BaseException as error:
            put_back(manager.guard, begun)
            if manager.guard.poisoned:
                raise manager.guard.poisoned_error(operation) from error
            raise


class BitmapChange:
    """
    A range of a bitmap source becomes populated or discarded. Something does change.

    Listeners first, then the bits: the state is what it was until everybody has agreed. The
    notification takes the source at its word meanwhile.

    :param start: First bit of the range that was asked for.
    :param end: First bit behind it.
    :param changed: How many bits of it change.
    """

    __slots__ = (
        "_saved",
        "_span",
        "changed_bytes",
        "notification",
        "populate",
        "source",
    )

    def __init__(
        self, source: BitmapSource, start: int, end: int, changed: int, *, populate: bool
    ) -> None:
        shift = source.shift
        self.source = source
        self.populate = populate
        #: How many bytes really change.
        self.changed_bytes = changed << shift
        self._saved: SavedBits | None = None
        whole = changed == end - start
        if not whole:
            span = source.bits.span(start, end, value=not populate)
            assert span is not None  # something changes, so something has the other value
            start, end = span
            self._saved = source.bits.save(start, end)
        self._span = start, end
        self.notification = Notification(
            source.block.discard_manager,
            start << shift,
            end << shift,
            populate=populate,
            source=source,
            runs=None if whole else self._runs,
            hollow=whole or not populate,
        )

    @property
    def mixture(self) -> bool:
        """Whether some of the range that was asked for is in the new state already."""
        return self._saved is not None

    def _runs(self, start: int, end: int) -> Runs:
        """Yield what changes of [start, end), in whole granules; only while the bits are as they were."""
        shift = self.source.shift
        first, last = start >> shift, ((end - 1) >> shift) + 1
        for low, high in self.source.bits.runs(first, last, value=not self.populate):
            yield low << shift, high << shift

    def changed_runs(self) -> Runs:
        """Yield what changes as (start, end), ascending; only while the bits are as they were."""
        start, end = (bit << self.source.shift for bit in self._span)
        return iter(((start, end),)) if self._saved is None else self._runs(start, end)

    def flip(self) -> None:
        """Change the bits, wherever they were left."""
        start, end = self._span
        if self.populate:
            self.source.bits.set(start, end)
        else:
            self.source.bits.clear(start, end)

    def flip_back(self) -> None:
        """Undo :meth:`flip`, whether it happened, half happened or did not."""
        start, end = self._span
        bits = self.source.bits
        if self._saved is not None:
            bits.restore(start, end, self._saved)
        elif self.populate:
            bits.clear(start, end)
        else:
            bits.set(start, end)

    def __repr__(self) -> str:
        start, end = (bit << self.source.shift for bit in self._span)
        return f"<BitmapChange {describe_range(start, end - start)} of {self.source.block.name!r}>"
