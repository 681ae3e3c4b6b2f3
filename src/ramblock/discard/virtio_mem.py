# SPDX-License-Identifier: Apache-2.0
"""Memory that the guest gains and loses in blocks while it runs (QEMU: hw/virtio/virtio-mem.c)."""

from __future__ import annotations

from ramblock.discard.bitmap_source import BitmapSource
from ramblock.discard.coordination import DiscardHold, HoldKind
from ramblock.discard.manager import ManagedBlock
from ramblock.errors import UsageError, describe_range
from ramblock.units import PAGE_SIZE, check_granularity, check_range


class VirtioMem(BitmapSource):
    """
    A virtio-mem device's plug state, as a discard source.

    It adds itself to the block, with everything unplugged: listeners hear the discard, then the
    memory is freed. Plug state and page state are independent: an unplugged range may be converted,
    and is mapped when it is plugged. Taken out of the block's sources and added again, it keeps its
    plug state, and frees all it withholds.

    To plug and to unplug are all or nothing. They raise :class:`~ramblock.errors.UsageError` for a
    range that is not of whole device blocks, leaves the block, or is partly so already;
    :class:`~ramblock.errors.MappingLimitError` where a mapper has no room, or cannot cut there; and
    the exception of a listener that refused. Nothing has changed then, unless it is
    :class:`~ramblock.errors.PoisonedError`: the memory is kept.

    :param block: The block that the device provides.
    :param block_size: Of the device, in bytes: a power of two, at least a host page, that divides
        the block's size.
    :raises UsageError: *block_size* does not fit.
    :raises BusyError: Somebody forbids discards on this memory.
    :raises Exception: Whatever a listener raised when it refused; the device is not there and all
        is as before.
    """

    #: Unplugged memory is not the guest's: it is freed.
    withholds = True

    def __init__(self, block: ManagedBlock, block_size: int) -> None:
        check_granularity(block_size, "virtio-mem block size")
        if block_size < PAGE_SIZE or block.size % block_size:
            raise UsageError(
                f"virtio-mem blocks of {block_size:#x} bytes do not fit block {block.name!r} of"
                f" {block.size:#x} bytes",
                value=block_size,
                expected=f"at least {PAGE_SIZE:#x}, and a divisor of the block's size",
            )
        super().__init__(block, block_size)
        self.place = f"virtio-mem on block {block.name!r}"
        # The claim that discards will happen, as long as the device is a source.
        self._hold: DiscardHold | None = None
        block.discard_manager.add_source(self)

    @property
    def plugged_size(self) -> int:
        """The size of all plugged blocks, in bytes."""
        return self.populated_bytes

    def plug(self, offset: int, size: int) -> None:
        """Plug ``[offset, offset + size)``, in bytes: listeners hear of it, then it counts."""
        self.block.discard_manager.run("plug", self._change, "plug", offset, size)

    def unplug(self, offset: int, size: int) -> None:
        """Unplug a range, in bytes: listeners first, then both backings are freed."""
        self.block.discard_manager.run("unplug", self._change, "unplug", offset, size)

    def _change(self, operation: str, offset: int, size: int) -> None:
        manager, populate = self.block.discard_manager, operation == "plug"
        manager.check_open()
        if self._hold is None:
            text = f"virtio-mem was removed from the sources of block {self.block.name!r}"
            raise UsageError(text, value=self)
        check_range(offset, size, limit=self.block.size, align=self.granularity, what=self.place)
        change = self.plan(offset, size, populate=populate)
        if operation != "unplug_all" and (change is None or change.changed_bytes < size):
            already = "plugged already" if populate else "unplugged already"
            where = f"{self.place}: {describe_range(offset, size)}"
            raise UsageError(f"{where} is {already}, at least in part", value=(offset, size))
        if change is not None:
            self.change(operation, change)
            keep_or_free = manager.freeing.keep_used if populate else manager.freeing.free
            keep_or_free(offset, size)

    def unplug_all(self) -> None:
        """Unplug everything that is plugged, in one transaction; nothing plugged is fine."""
        manager, size = self.block.discard_manager, self.block.size
        manager.run("unplug_all", self._change, "unplug_all", 0, size)

    def on_adding(self) -> None:
        """Claim that discards will happen; the manager calls it before it adds the device."""
        manager = self.block.discard_manager
        self._hold = manager.guard.discards.hold(self.place, HoldKind.REQUIRE_COORDINATED)
        manager.holds.append(self._hold)

    def on_removed(self) -> None:
        """Let go of the claim; the manager calls it when the device is no source any more."""
        assert self._hold is not None  # on_adding() came first
        self._hold.release()
        self.block.discard_manager.holds.remove(self._hold)
        self._hold = None

    def __repr__(self) -> str:
        plugged = f"{self.plugged_size:#x} of {self.block.size:#x} bytes plugged"
        return f"<VirtioMem of {self.block.name!r}: {plugged}>"
