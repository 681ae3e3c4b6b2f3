# SPDX-License-Identifier: Apache-2.0
"""
The edges of a guest, wrapped: every call of a target, a VM or a backing is shown to the verifier.

Each wrapper makes the call of what it wraps and changes nothing about it. ``ramblock run`` puts its
trace and its faults on purpose around the same wrappers; tests get them from
:class:`~ramblock.testing.GuestChecker`. Failures on purpose belong outside of them, so that the
verifier sees what really happened.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from ramblock.discard.section import RamSection
from ramblock.discard.virtio_mem import VirtioMem
from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.errors import DmaError
from ramblock.guest.block import RamBlock
from ramblock.guest.vm import MAKE_PRIVATE, MAKE_SHARED, MemorySlots, Vm
from ramblock.hostmem.backing import PrivateBacking, SharedBacking
from ramblock.hostmem.in_place import InPlaceBacking
from ramblock.testing.verifier import Verifier
from ramblock.testing.violations import ViolationKind
from ramblock.units import PAGE_SIZE

__all__ = ["CheckedInPlace", "CheckedPrivate", "CheckedShared", "CheckedTarget", "CheckedVm"]


class CheckedTarget:
    """
    A DMA target under watch.

    :param name: By which the verifier knows it.
    """

    def __init__(self, verifier: Verifier, name: str, inner: DmaTarget) -> None:
        self.verifier = verifier
        self.name = name
        self.inner = inner

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the inner target."""
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, watched."""
        self.verifier.about_to_map(self.name, iova, memory)
        try:
            self.inner.map(iova, memory, writable=writable)
        except BaseException as error:
            if not _is_refusal(error):
                self.verifier.may_have_mapped(self.name, iova, memory)
            raise
        else:
            self.verifier.has_mapped(self.name, iova, memory)
        finally:
            self.verifier.ask(self.name, "map", iova, memory.size)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, watched."""
        try:
            removed = self.inner.unmap(iova, size)
        except BaseException as error:
            if not _is_refusal(error):
                self.verifier.may_have_unmapped(self.name, iova, size)
            raise
        else:
            self.verifier.has_unmapped(self.name, iova, size, removed)
            return removed
        finally:
            self.verifier.ask(self.name, "unmap", iova, size)

    def close(self) -> None:
        """Close the inner target."""
        self.inner.close()
        self.verifier.has_closed(self.name)

    def before_access(self) -> int:
        """Take a time stamp before an access of the device behind it."""
        return self.verifier.before_access()

    def note_access(self, iova: int, size: int, since: int) -> None:
        """Note an access that was let through; one that should have faulted is a violation."""
        self.verifier.device_reached(self.name, iova, size, since)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.inner!r}>"


def _is_refusal(error: BaseException) -> bool:
    """After anything else, Ctrl-C for instance, nobody knows whether the call was carried out."""
    return isinstance(error, DmaError) and not error.in_doubt


class CheckedVm:
    """A VM under watch; without an inner one it stands in for one that always agrees."""

    def __init__(self, verifier: Verifier, inner: Vm | None = None) -> None:
        self.verifier = verifier
        self.inner = inner

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, watched. A page that is being made private counts as private, even if that fails."""
        if private is MAKE_PRIVATE:
            self.verifier.about_to_make_private(gpa, size)
        if self.inner is not None:
            self.inner.set_memory_attributes(gpa, size, private)
        if private is MAKE_SHARED:
            self.verifier.has_made_shared(gpa, size)

    def add_memory_slot(self, section: RamSection) -> None:
        """Forward it, where the inner VM has slots."""
        if isinstance(self.inner, MemorySlots):
            self.inner.add_memory_slot(section)

    def remove_memory_slot(self, section: RamSection) -> None:
        """Forward it, where the inner VM has slots."""
        if isinstance(self.inner, MemorySlots):
            self.inner.remove_memory_slot(section)


class _Side:
    """
    One side of a block, and how it is known whether a page that is freed is in use.

    Where the guest has the whole side at one address (*gpa*) the verifier's own picture says so.
    Otherwise, once it is set, :attr:`block` is asked: virtio-mem and other sources have a say then,
    and there may be several places. It is known weakly: a target keeps alive the memory that it
    maps, and that must not lead to the block.
    """

    _block: Callable[[], RamBlock | None] = staticmethod(lambda: None)

    def __init__(self, verifier: Verifier, gpa: int | None) -> None:
        self.verifier = verifier
        self.gpa = gpa

    @property
    def block(self) -> RamBlock | None:
        """The block that it is a side of."""
        return self._block()

    @block.setter
    def block(self, block: RamBlock) -> None:
        self._block = weakref.ref(block)

    def _place(self, offset: int) -> int | None:
        return None if self.gpa is None else self.gpa + offset

    def _lose(self, offset: int, call: str) -> None:
        self.verifier.violation(
            ViolationKind.LOST_FREE, "", offset, PAGE_SIZE, f"{call} of {self.block!r}, by offset"
        )


class CheckedShared(_Side):
    """The shared side of a block under watch; hand it to ``RamBlock``."""

    def __init__(self, verifier: Verifier, inner: SharedBacking, gpa: int | None = None) -> None:
        super().__init__(verifier, gpa)
        self.inner = inner
        self.address = inner.address
        self.size = inner.size
        self.page_size = inner.page_size
        self.read = inner.read
        self.write = inner.write
        self.allocated_bytes = inner.allocated_bytes

    @property
    def fd(self) -> int | None:
        """The descriptor; None for anonymous memory."""
        return self.inner.fd

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        self.verifier.about_to_free_shared(self.address + offset, size, self._place(offset))
        block = self.block
        if self.gpa is None and block is not None:
            for page in range(offset, offset + size, PAGE_SIZE):
                if self._is_used(block, page):
                    self._lose(page, "free of the shared side")
        self.inner.discard(offset, size)

    def _is_used(self, block: RamBlock, offset: int) -> bool:
        return block.discard_manager.is_populated(RamSection(block, offset, PAGE_SIZE))

    def close(self) -> None:
        """Give everything back; a target that still maps some of it is a violation."""
        if self.verifier.maps_memory(self.address, self.size):
            self.verifier.violation(
                ViolationKind.FREED, "", self.address, self.size, f"close of {self.block!r}"
            )
        self.inner.close()
        self.verifier.has_given_back(self.address, self.size)


class CheckedPrivate(_Side):
    """The private side of a block under watch; hand it to ``RamBlock``."""

    def __init__(self, verifier: Verifier, inner: PrivateBacking, gpa: int | None = None) -> None:
        super().__init__(verifier, gpa)
        self.inner = inner
        self.fd = inner.fd
        self.size = inner.size

    def discard(self, offset: int, size: int) -> None:
        """Free, watched."""
        place, block = self._place(offset), self.block
        if place is not None:
            self.verifier.about_to_free_private(place, size)
        elif block is not None and not self.verifier.resetting:
            for page in range(offset, offset + size, PAGE_SIZE):
                if _used_privately(block, page):
                    self._lose(page, "free of the private side")
        self.inner.discard(offset, size)


class CheckedInPlace(CheckedShared):
    """A memory for both states under watch; hand it to ``RamBlock.create``."""

    inner: InPlaceBacking

    def __init__(self, verifier: Verifier, inner: InPlaceBacking) -> None:
        super().__init__(verifier, inner)
        verifier.about_to_make_memory_private(self.address, self.size)

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self.inner.fd

    def set_attributes(self, offset: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, watched. A page that is being made private counts as private, even if that fails."""
        address = self.address + offset
        if private is MAKE_PRIVATE:
            self.verifier.about_to_make_memory_private(address, size)
        self.inner.set_attributes(offset, size, private)
        if private is MAKE_SHARED:
            self.verifier.has_made_memory_shared(address, size)

    def _is_used(self, block: RamBlock, offset: int) -> bool:
        """Whether the page is plugged: in either state it is the guest's, until it is reset."""
        return not self.verifier.resetting and all(
            source.is_populated(offset, PAGE_SIZE)
            for source in block.discard_manager.sources
            if isinstance(source, VirtioMem)
        )


def _used_privately(block: RamBlock, offset: int) -> bool:
    """Whether a page is private, and every other source calls it populated."""
    attributes = block.attributes
    if attributes is None or attributes.is_populated(offset, PAGE_SIZE):
        return False
    return all(
        source is attributes or source.is_populated(offset, PAGE_SIZE)
        for source in block.discard_manager.sources
    )
