# SPDX-License-Identifier: Apache-2.0
"""Memory that is plugged and unplugged in blocks while the guest runs (QEMU: hw/virtio/virtio-mem.c)."""

from __future__ import annotations

from ramblock.discard.bitmap_source import BitmapSource
from ramblock.discard.manager import ManagedBlock
from ramblock.errors import UsageError, describe_range
from ramblock.units import PAGE_SIZE, check_granularity, check_range

__all__ = ["VirtioMem"]


class VirtioMem(BitmapSource):
    """
    A virtio-mem device's plug state, as a discard source.

    It adds itself to the block, with everything unplugged: listeners hear the discard, then the memory
    is freed. Plug state and page state are independent: an unplugged range may be converted, and is
    mapped when it is plugged. Taken out of the block's sources and added again, it keeps its plug
    state, and frees what it withholds.

    :param block: The block that the device provides.
    :param block_size: Of the device, in bytes: a power of two, at least a host page, that divides the block's size.
    :raises UsageError: *block_size* does not fit.
    :raises BusyError: Somebody forbids discards on this memory.
    :raises Exception: Whatever a listener raised when it refused; the device is not there and all is as before.
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
        block.discard_manager.add_source(self)

    @property
    def block_size(self) -> int:
        """The device's block size in bytes."""
        return self.granularity

    @property
    def plugged_size(self) -> int:
        """How much is plugged, in bytes."""
        return self.populated_bytes

    def plug(self, offset: int, size: int) -> None:
        """
        Plug ``[offset, offset + size)``: listeners hear what becomes populated, then it counts. All or nothing.

        :raises UsageError: Not whole device blocks, outside the block, or partly plugged already; nothing has changed.
        :raises MappingLimitError: A mapper has no room for it; nothing has changed.
        :raises PoisonedError: The block is poisoned, or this call poisoned it.
        :raises Exception: Whatever a listener raised when it refused; nothing has changed.
        """
        self.block.discard_manager.run("plug", self._plug, offset, size)

    def _plug(self, offset: int, size: int) -> None:
        self._check(offset, size)
        if self.bits.count(offset >> self.shift, (offset + size) >> self.shift):
            raise UsageError(
                f"{self._name(offset, size)} is plugged already, at least in part",
                value=(offset, size),
            )
        self._change("plug", offset, size, populate=True)
        self.block.discard_manager.freeing.keep_used(offset, size)

    def unplug(self, offset: int, size: int) -> None:
        """
        Unplug ``[offset, offset + size)``: listeners first, then the state, then both backings are freed.

        :raises UsageError: Not whole device blocks, outside the block, or partly unplugged already; nothing has changed.
        :raises MappingLimitError: A mapper has no room to cut there; nothing has changed.
        :raises PoisonedError: The block is poisoned, or this call poisoned it; the memory is kept.
        :raises Exception: Whatever a listener raised when it refused; nothing has changed.
        """
        self.block.discard_manager.run("unplug", self._unplug, offset, size)

    def _unplug(self, offset: int, size: int) -> None:
        self._check(offset, size)
        if not self.is_populated(offset, size):
            raise UsageError(
                f"{self._name(offset, size)} is unplugged already, at least in part",
                value=(offset, size),
            )
        self._change("unplug", offset, size, populate=False)
        self.block.discard_manager.freeing.free(offset, size)

    def unplug_all(self) -> None:
        """
        Unplug everything that is plugged, in one transaction; nothing plugged is fine.

        Raises what :meth:`unplug` raises, with the same state left.
        """
        self.block.discard_manager.run("unplug_all", self._unplug_all)

    def _unplug_all(self) -> None:
        self._check_present()
        if self.populated_bytes:
            self._change("unplug_all", 0, self.block.size, populate=False)
            self.block.discard_manager.freeing.free(0, self.block.size)

    def on_adding(self) -> None:
        """Claim that discards will happen; the discard manager calls it before it adds the device."""
        manager = self.block.discard_manager
        owner = f"virtio-mem on block {self.block.name!r}"
        self._hold = manager.guard.discards.require_coordinated(owner)
        manager.holds.append(self._hold)

    def on_removed(self) -> None:
        """Let go of the claim; the discard manager calls it when the device is no source any more."""
        self._hold.release()
        self.block.discard_manager.holds.remove(self._hold)

    def _change(self, operation: str, offset: int, size: int, *, populate: bool) -> None:
        change = self.plan(offset, size, populate=populate)
        assert change is not None  # the callers have checked that something changes
        self.change(operation, change)

    def _check(self, offset: int, size: int) -> None:
        self._check_present()
        check_range(
            offset,
            size,
            limit=self.block.size,
            align=self.granularity,
            what=f"virtio-mem on block {self.block.name!r}",
        )

    def _check_present(self) -> None:
        self.block.discard_manager.check_open()
        if not any(source is self for source in self.block.discard_manager.sources):
            raise UsageError(
                f"virtio-mem was removed from the sources of block {self.block.name!r}", value=self
            )

    def _name(self, offset: int, size: int) -> str:
        return f"virtio-mem on block {self.block.name!r}: {describe_range(offset, size)}"

    def __repr__(self) -> str:
        plugged = f"{self.plugged_size:#x} of {self.block.size:#x} bytes plugged"
        return f"<VirtioMem of {self.block.name!r}: {plugged}>"
