# SPDX-License-Identifier: Apache-2.0
"""
A checker at the edges of a guest: looks at every call whether a device could reach what it must not.

It wraps the targets, the VM and the backings, and keeps its own picture: which pages' attribute is private, which shared
pages are freed, and what each target maps, taken from the target itself after every call. So it judges the order of calls
and the effect of failures, and not what anybody's books say::

    checker = GuestChecker()
    iommu = SoftIommu()
    memory = GuestMemory(checker.vm())
    memory.attach(checker.target(iommu))
    ...
    checker.verify()

A violation is noted rather than raised, because whoever makes the call would take an exception for a failure of the call and
put something back; :meth:`GuestChecker.verify` raises. Each call costs a walk over all mappings: for tests, not for use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ramblock.discard.section import RamSection
from ramblock.discard.virtio_mem import VirtioMem
from ramblock.dma.soft import Mapping
from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.errors import describe_range
from ramblock.guest.block import RamBlock
from ramblock.guest.vm import MAKE_PRIVATE, MAKE_SHARED, MemorySlots, Vm
from ramblock.hostmem.backing import PrivateBacking, SharedBacking
from ramblock.hostmem.in_place import InPlaceBacking
from ramblock.units import PAGE_SIZE

__all__ = [
    "CheckedInPlace",
    "CheckedPrivate",
    "CheckedShared",
    "CheckedTarget",
    "CheckedVm",
    "GuestChecker",
    "ListedTarget",
]


class ListedTarget(DmaTarget, Protocol):
    """A target that can tell what it maps; :class:`~ramblock.dma.SoftIommu` is one."""

    def mappings(self) -> Sequence[Mapping]:
        """List what is mapped at this moment."""


class GuestChecker:
    """What is known about one guest from the outside, and what was wrong with it."""

    def __init__(self) -> None:
        #: What was wrong, oldest first, in words.
        self.violations: list[str] = []
        #: How many calls were looked at.
        self.calls = 0
        #: The guest is being reset: private memory that it used may be freed.
        self.resetting = False
        #: Guest pages whose attribute is private, by guest address.
        self.private_pages: set[int] = set()
        #: Pages of memory in place whose attribute is private, by host address.
        self.private_memory: set[int] = set()
        #: Pages of shared backings that are freed and were not mapped since, by host address.
        self.freed_pages: set[int] = set()
        # Not those around them: what a block refers to, and it does to the checker, must not keep alive what maps it.
        self._targets: list[ListedTarget] = []

    # -- wrapping -------------------------------------------------------------------------------------------------

    def target(self, inner: ListedTarget) -> CheckedTarget:
        """Watch a target."""
        self._targets.append(inner)
        return CheckedTarget(self, inner)

    def vm(self, inner: Vm | None = None) -> CheckedVm:
        """Watch a VM, or stand in for one that always agrees."""
        return CheckedVm(self, inner)

    def shared(self, inner: SharedBacking) -> CheckedShared:
        """Watch the shared side of a block; hand the result to ``RamBlock``, and the block to its ``block``."""
        return CheckedShared(self, inner)

    def private(self, inner: PrivateBacking) -> CheckedPrivate:
        """Watch the private side of a block; hand the result to ``RamBlock``, and the block to its ``block``."""
        return CheckedPrivate(self, inner)

    def in_place(self, inner: InPlaceBacking) -> CheckedInPlace:
        """Watch a memory for both states; hand the result to ``RamBlock.create``, and the block to its ``block``."""
        return CheckedInPlace(self, inner)

    # -- judging --------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """
        Raise if anything was ever wrong.

        :raises AssertionError: With all violations.
        """
        if self.violations:
            raise AssertionError("\n".join(self.violations))

    def look(self, call: str) -> None:
        """Compare the picture with what the targets map now, after *call*."""
        self.calls += 1
        for target in self._targets:
            for mapping in target.mappings():
                shift = mapping.memory.address - mapping.iova
                for page in range(mapping.iova, mapping.iova + mapping.size, PAGE_SIZE):
                    if page in self.private_pages or page + shift in self.private_memory:
                        self.complain(
                            f"{call}: {target!r} maps {page:#x}, whose attribute is private"
                        )
                    if page + shift in self.freed_pages:
                        self.complain(f"{call}: {target!r} maps {page:#x}, whose memory is freed")

    def complain(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(text)

    def maps_host(self, address: int, size: int) -> bool:
        """Whether any target maps a byte of host memory ``[address, address + size)``."""
        return any(
            mapping.memory.address < address + size
            and address < mapping.memory.address + mapping.memory.size
            for target in self._targets
            for mapping in target.mappings()
        )

    def __repr__(self) -> str:
        return f"<GuestChecker: {self.calls} calls, {len(self.violations)} violations>"


def _pages(start: int, size: int) -> Iterable[int]:
    return range(start, start + size, PAGE_SIZE)


class CheckedTarget:
    """A target under watch. Made by :meth:`GuestChecker.target`."""

    def __init__(self, checker: GuestChecker, inner: ListedTarget) -> None:
        self.inner = inner
        self._checker = checker

    @property
    def capabilities(self) -> DmaCapabilities:
        """Those of the inner target."""
        return self.inner.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Map, and look."""
        # To pin a hole is to fill it: what was freed here is fresh memory now.
        self._checker.freed_pages.difference_update(_pages(memory.address, memory.size))
        try:
            self.inner.map(iova, memory, writable=writable)
        finally:
            self._checker.look(f"map {describe_range(iova, memory.size)}")

    def unmap(self, iova: int, size: int) -> int:
        """Unmap, and look."""
        try:
            return self.inner.unmap(iova, size)
        finally:
            self._checker.look(f"unmap {describe_range(iova, size)}")

    def close(self) -> None:
        """Close the inner target."""
        self.inner.close()

    def __repr__(self) -> str:
        return f"<CheckedTarget of {self.inner!r}>"


class CheckedVm:
    """A VM under watch. Made by :meth:`GuestChecker.vm`."""

    def __init__(self, checker: GuestChecker, inner: Vm | None) -> None:
        self.inner = inner
        self._checker = checker

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, and look. What is being made private counts as private, even if that fails."""
        pages = _pages(gpa, size)
        if private is MAKE_PRIVATE:
            self._checker.private_pages.update(pages)
        try:
            if self.inner is not None:
                self.inner.set_memory_attributes(gpa, size, private)
            if private is MAKE_SHARED:
                self._checker.private_pages.difference_update(pages)
        finally:
            self._checker.look(f"attribute of {describe_range(gpa, size)}")

    def add_memory_slot(self, section: RamSection) -> None:
        """Forward it, where the inner VM has slots."""
        if isinstance(self.inner, MemorySlots):
            self.inner.add_memory_slot(section)

    def remove_memory_slot(self, section: RamSection) -> None:
        """Forward it, where the inner VM has slots."""
        if isinstance(self.inner, MemorySlots):
            self.inner.remove_memory_slot(section)


class _Side:
    """One side of a block; knows the block weakly, since a target keeps alive what it maps, which must not lead to it."""

    _block: Callable[[], RamBlock | None] = staticmethod(lambda: None)

    @property
    def block(self) -> RamBlock | None:
        """The block that it is a side of; once set, to free what is in use is a violation too."""
        return self._block()

    @block.setter
    def block(self, block: RamBlock) -> None:
        self._block = weakref.ref(block)


class CheckedShared(_Side):
    """The shared side of a block under watch. Made by :meth:`GuestChecker.shared`."""

    def __init__(self, checker: GuestChecker, inner: SharedBacking) -> None:
        self.inner = inner
        self.address = inner.address
        self.size = inner.size
        self.page_size = inner.page_size
        self._checker = checker

    @property
    def fd(self) -> int | None:
        """The descriptor; None for anonymous memory."""
        return self.inner.fd

    def read(self, offset: int, size: int) -> bytes:
        """Read."""
        return self.inner.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write."""
        self.inner.write(offset, data)

    def discard(self, offset: int, size: int) -> None:
        """Free, and look."""
        what = f"free {describe_range(offset, size)} of the shared side"
        block = self.block
        if block is not None and self._in_use(block, offset, size):
            self._checker.complain(f"{what} of {block!r}: part of it is in use")
        self._checker.freed_pages.update(_pages(self.address + offset, size))
        try:
            self.inner.discard(offset, size)
        finally:
            self._checker.look(what)

    def _in_use(self, block: RamBlock, offset: int, size: int) -> bool:
        """Whether anything of it is populated."""
        return any(block.discard_manager.populated(RamSection(block, offset, size)))

    def allocated_bytes(self) -> int | None:
        """Bytes of memory in use."""
        return self.inner.allocated_bytes()

    def close(self) -> None:
        """Give everything back, and look whether any of it is mapped."""
        if self._checker.maps_host(self.address, self.size):
            self._checker.complain(f"close of {self.block!r}: part of it is mapped")
        self.inner.close()


class CheckedPrivate(_Side):
    """The private side of a block under watch. Made by :meth:`GuestChecker.private`."""

    def __init__(self, checker: GuestChecker, inner: PrivateBacking) -> None:
        self.inner = inner
        self.fd = inner.fd
        self.size = inner.size
        self._checker = checker

    def discard(self, offset: int, size: int) -> None:
        """Free, and look."""
        self._checker.calls += 1
        block = None if self._checker.resetting else self.block
        if block is not None and any(_used_privately(block, page) for page in _pages(offset, size)):
            what = describe_range(offset, size)
            self._checker.complain(
                f"free {what} of the private side of {block!r}: the guest uses it"
            )
        self.inner.discard(offset, size)


class CheckedInPlace(CheckedShared):
    """A memory for both states under watch. Made by :meth:`GuestChecker.in_place`."""

    inner: InPlaceBacking

    def __init__(self, checker: GuestChecker, inner: InPlaceBacking) -> None:
        super().__init__(checker, inner)
        checker.private_memory.update(_pages(self.address, self.size))

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self.inner.fd

    def set_attributes(self, offset: int, size: int, private: bool) -> None:  # noqa: FBT001 - a fixed name
        """Set, and look. What is being made private counts as private, even if that fails."""
        pages = _pages(self.address + offset, size)
        if private is MAKE_PRIVATE:
            self._checker.private_memory.update(pages)
        try:
            self.inner.set_attributes(offset, size, private)
            if private is MAKE_SHARED:
                self._checker.private_memory.difference_update(pages)
        finally:
            self._checker.look(f"attribute of {describe_range(offset, size)} in place")

    def _in_use(self, block: RamBlock, offset: int, size: int) -> bool:
        """Whether anything of it is plugged: in either state it is the guest's."""
        if self._checker.resetting:
            return False
        devices = [
            source for source in block.discard_manager.sources if isinstance(source, VirtioMem)
        ]
        return any(
            all(device.is_populated(page, PAGE_SIZE) for device in devices)
            for page in _pages(offset, size)
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
