# SPDX-License-Identifier: Apache-2.0
"""A discard source that is a bitmap, and one change of it: what page attributes and virtio-mem have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.errors import describe_range
from ramblock.memory.notification import Change, Notification
from ramblock.memory.transaction import Step

if TYPE_CHECKING:
    from ramblock.memory.block import RamBlock

__all__ = ["CHANGE_STEPS", "BitmapChange", "BitmapSource"]


class BitmapSource:
    """
    One bit per granule of a block; set means populated.

    :param block: The block it speaks of.
    :param granularity: In bytes; a power of two that divides the block's size.
    """

    def __init__(self, block: RamBlock, granularity: int) -> None:
        self.block = block
        #: For messages.
        self.place = f"block {block.name!r}"
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.bits = SparseBitmap(block.size >> self.shift)
        self.populated_bytes = 0

    def is_populated(self, offset: int, size: int) -> bool:
        """Whether all of ``[offset, offset + size)`` is populated; any alignment."""
        return self.bits.all(offset >> self.shift, ((offset + size - 1) >> self.shift) + 1)

    def ranges(self, offset: int, size: int, /) -> Iterator[tuple[int, int]]:
        """Yield the populated runs inside ``[offset, offset + size)`` as (offset, size), ascending, clipped."""
        shift, limit = self.shift, offset + size
        for start, end in self.bits.runs(offset >> shift, ((limit - 1) >> shift) + 1):
            low, high = max(start << shift, offset), min(end << shift, limit)
            yield low, high - low


class BitmapChange:
    """
    A range of a bitmap source becomes populated or discarded: the piece of such a transaction.

    Listeners first, then the bits: the state is what it was until everybody has agreed. The notification takes the
    source at its word meanwhile.
    """

    __slots__ = ("_saved", "_span", "before", "changed_bytes", "notification", "populate", "source")

    def __init__(self, source: BitmapSource, offset: int, size: int, *, populate: bool) -> None:
        shift = source.shift
        start, end = offset >> shift, (offset + size) >> shift
        populated = source.bits.count(start, end)
        total = end - start
        changed = total - populated if populate else populated
        self.source = source
        self.populate = populate
        #: How many bytes really change.
        self.changed_bytes = changed << shift
        #: All, none or some of the range was populated.
        self.before = None if 0 < populated < total else bool(populated)
        #: None when nothing changes.
        self.notification: Notification | None = None
        self._saved: SavedBits | None = None
        if not changed:
            return
        if changed == total:
            change = Change(offset, offset + size, None, hollow=True)
        else:
            span = source.bits.span(start, end, value=not populate)
            assert span is not None  # something changes, so something has the other value
            start, end = span
            change = Change(start << shift, end << shift, self._runs, hollow=not populate)
            self._saved = source.bits.save(start, end)
        self._span = start, end
        self.notification = source.block.discard_manager.notification(
            source, change, populate=populate
        )

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        shift = self.source.shift
        for low, high in self.source.bits.runs(
            start >> shift, end >> shift, value=not self.populate
        ):
            yield low << shift, high << shift

    @property
    def byte_span(self) -> tuple[int, int]:
        """First byte that changes, and first byte behind the last; only if something changes."""
        start, end = self._span
        return start << self.source.shift, end << self.source.shift

    def changed_runs(self) -> Iterator[tuple[int, int]]:
        """Yield what changes as (offset, size), ascending; only while the bits are as they were."""
        if self.notification is not None:
            start, end = (bit << self.source.shift for bit in self._span)
            runs = iter(((start, end),)) if self._saved is None else self._runs(start, end)
            for low, high in runs:
                yield low, high - low

    def tell(self) -> None:
        """Tell the listeners."""
        if self.notification is not None:
            self.notification.tell()

    def take_back(self) -> None:
        """Undo :meth:`tell`."""
        if self.notification is not None:
            self.notification.take_back()

    def flip(self) -> None:
        """Change the bits."""
        if self.notification is None:
            return
        source = self.source
        if self.populate:
            source.bits.set(*self._span)
            source.populated_bytes += self.changed_bytes
        else:
            source.bits.clear(*self._span)
            source.populated_bytes -= self.changed_bytes

    def flip_back(self) -> None:
        """Undo :meth:`flip`, whether it happened, half happened or did not."""
        if self.notification is None:
            return
        source = self.source
        if self._saved is not None:
            source.bits.restore(*self._span, self._saved)
        elif self.populate:
            source.bits.clear(*self._span)
        else:
            source.bits.set(*self._span)
        self._recount()

    def settle(self) -> None:
        """Make the bits what was asked for, wherever :meth:`flip` and :meth:`flip_back` were left."""
        if self.notification is None:
            return
        source = self.source
        if self.populate:
            source.bits.set(*self._span)
        else:
            source.bits.clear(*self._span)
        self._recount()

    def doubt(self, reason: str) -> None:
        """Note what changes as in doubt for all listeners; only while the bits are as they were."""
        if self.notification is not None:
            self.notification.doubt(reason)

    def _recount(self) -> None:
        source = self.source
        source.populated_bytes = source.bits.count(0, source.bits.length) << source.shift

    def __repr__(self) -> str:
        offset, end = (bit << self.source.shift for bit in self._span)
        return (
            f"<BitmapChange {describe_range(offset, end - offset)} of {self.source.block.name!r}>"
        )


#: Listeners, then bits.
CHANGE_STEPS = (
    Step("notify", BitmapChange.tell, BitmapChange.take_back),
    # The listeners stay told then.
    Step("state", BitmapChange.flip, BitmapChange.flip_back, stuck=BitmapChange.settle),
)
