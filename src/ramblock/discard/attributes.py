# SPDX-License-Identifier: Apache-2.0
"""The page states of a block (QEMU: RamBlockAttributes, system/ram-block-attributes.c, 10.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum
from typing import overload

from ramblock.discard.bitmap_source import BitmapChange, BitmapSource
from ramblock.discard.manager import ManagedBlock
from ramblock.errors import UsageError
from ramblock.events import StateChanged
from ramblock.units import PAGE_SIZE, check_range

_log = logging.getLogger(__name__)


class PageState(Enum):
    """The state of a guest page. Everything starts private."""

    PRIVATE = "private"  #: Only the guest can read it. For a discard manager: discarded.
    SHARED = "shared"  #: The host and its devices can read it. For a discard manager: populated.


def check_state(to: object) -> None:
    """Raise :class:`UsageError` unless *to* is a :class:`PageState`."""
    if not isinstance(to, PageState):
        expected = "PageState.PRIVATE or PageState.SHARED"
        raise UsageError(f"{to!r} is not a page state", value=to, expected=expected)


class RamBlockAttributes(BitmapSource):
    """
    One page state per host page of a block with a private backing; a discard source.

    User code reads it as ``block.attributes``.
    """

    #: A block keeps its page states: they cannot be removed from its sources.
    permanent = True

    def __init__(self, block: ManagedBlock) -> None:
        super().__init__(block, PAGE_SIZE)

    @property
    def shared_bytes(self) -> int:
        """The size of all shared pages, in bytes."""
        return self.populated_bytes

    def is_shared(self, offset: int, size: int) -> bool:
        """
        Whether every page that ``[offset, offset + size)`` touches is shared.

        :raises UsageError: The range is empty or leaves the block.
        """
        check_range(offset, size, limit=self.block.size, align=1, what=self.place)
        return self.is_populated(offset, size)

    @overload
    def ranges(self, where: PageState, /) -> Iterator[tuple[int, int]]: ...
    @overload
    def ranges(self, where: int, size: int, /) -> Iterator[tuple[int, int]]: ...
    def ranges(self, where: PageState | int, size: int = 0, /) -> Iterator[tuple[int, int]]:
        """
        Yield the maximal runs of pages as (offset, size) in bytes, ascending.

        ``ranges(state)`` is the whole block by page state. ``ranges(offset, size)`` is the question
        of a discard manager to any source: the populated, that is shared, runs inside the range.

        :raises UsageError: Not a page state.
        """
        if isinstance(where, int):
            return super().ranges(where, size)
        check_state(where)
        runs = self.bits.runs(0, self.bits.length, value=where is PageState.SHARED)
        return ((start << self.shift, (end - start) << self.shift) for start, end in runs)

    def state_change(self, offset: int, size: int, to: PageState) -> None:
        """
        Change the state of a range, where it differs, and tell the listeners: all or nothing.

        It knows no KVM and frees nothing. On a block that is placed in a guest,
        ``GuestMemory.convert`` is the one to call.

        :param offset: In bytes, as *size*; both multiples of the page size.
        :raises UsageError: Unaligned, empty, outside the block, not a page state, or in a guest
            that has a VM. Else it raises as :meth:`RamDiscardManager.notify_populate`, after which
            all is as before.
        """
        self.block.discard_manager.run("state_change", self._state_change, offset, size, to)

    def _state_change(self, offset: int, size: int, to: PageState) -> None:
        manager = self.block.discard_manager
        if manager.closed:
            manager.check_open()
        check_state(to)
        if manager.guard.has_vm:
            text = f"{self.place} is in a guest with a VM, whose attributes would stay behind"
            raise UsageError(text, value=self.block.name, expected="GuestMemory.convert")
        check_range(offset, size, limit=self.block.size, align=PAGE_SIZE, what=self.place)
        change = self.plan(offset, size, populate=to is PageState.SHARED)
        if change is not None:
            self.change("state_change", change)
            manager.freeing.keep_used(offset, size)
            if manager.guard.observer is not None:
                self.observe(change, offset, size)

    def observe(self, change: BitmapChange, offset: int, size: int) -> None:
        """Emit the event of a change that was asked for ``[offset, offset + size)`` and is done."""
        observer = self.block.discard_manager.guard.observer
        if observer is not None:
            before, after = ("private", "shared") if change.populate else ("shared", "private")
            before = before if change.saved is None else "mixture"
            event = StateChanged(self.block.name, offset, size, before, after)
            try:
                observer(event)
            except BaseException:  # watching never changes an outcome
                _log.exception("the observer failed on %r", event)

    def __repr__(self) -> str:
        shared = f"{self.shared_bytes:#x} of {self.block.size:#x} bytes shared"
        return f"<RamBlockAttributes of {self.block.name!r}: {shared}>"
