# SPDX-License-Identifier: Apache-2.0
"""A memory that converts in place, without a kernel: real pages, a simulated attribute, pins."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ramblock.bitmap import SparseBitmap
from ramblock.hostmem.backing import MemfdBacking, read_fd, write_fd
from ramblock.testing.checker import ListedTarget
from ramblock.units import PAGE_SIZE, check_range

__all__ = ["SimulatedInPlace"]


class SimulatedInPlace(MemfdBacking):
    """
    A memfd in the role of a guest_memfd that serves both states.

    Hand it to ``RamBlock.create`` as *private*. It is as unhelpful as the interface allows. A page
    that somebody holds does not become private (EAGAIN), and the pages in front of it are private
    by then. The host's accesses to a private page fail (EFAULT, where a load would be SIGBUS)::

        iommu = SoftIommu()
        ram = SimulatedInPlace("ram", 16 * MIB, pinned_by=[iommu])
        block = RamBlock.create("ram", ram.size, private=ram)

    :param name: Of the memfd.
    :param size: In bytes.
    :param pinned_by: Targets whose mappings hold pages, as an IOMMU does.
    :raises OSError: The kernel has no memory; nothing is held.
    """

    def __init__(self, name: str, size: int, *, pinned_by: Sequence[ListedTarget] = ()) -> None:
        super().__init__(name, size)
        #: Targets whose mappings hold pages; may be changed.
        self.pinned_by = pinned_by
        #: Called before each page that changes, with its offset and whether it becomes private.
        #: Raise to stop there.
        self.before_page: Callable[[int, bool], object] | None = None
        #: ``(offset, size, private)`` of each call, oldest first; refused ones too. May be cleared.
        self.calls: list[tuple[int, int, bool]] = []
        self._shared = SparseBitmap(size // PAGE_SIZE)
        self._pins: Counter[int] = Counter()

    # -- the attribute -----------------------------------------------------------------------------

    def set_attributes(self, offset: int, size: int, private: bool) -> None:  # noqa: FBT001 - as a VM's
        """
        Make pages private or shared, one after the other.

        :raises OSError: EAGAIN: a page that is to become private is held by somebody. Those before
            it are done.
        """
        check_range(offset, size, limit=self.size, align=PAGE_SIZE, what="memory in place")
        self.calls.append((offset, size, private))
        # Setting what is set already changes nothing, and a hold is in nobody's way then.
        for page in list(self._pages_that_are(offset, size, shared=private)):
            if self.before_page is not None:
                self.before_page(page, private)
            if private and self.is_pinned(page):
                raise OSError(errno.EAGAIN, f"page {page:#x} is pinned")
            change = self._shared.clear if private else self._shared.set
            change(page // PAGE_SIZE, page // PAGE_SIZE + 1)

    def private_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the maximal runs of private pages as (offset, size) in bytes, ascending."""
        for start, end in self._shared.runs(0, self._shared.length, value=False):
            yield start * PAGE_SIZE, (end - start) * PAGE_SIZE

    def _pages_that_are(self, offset: int, size: int, *, shared: bool) -> Iterator[int]:
        first, last = offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE + 1
        for start, end in self._shared.runs(first, last, value=shared):
            yield from range(start * PAGE_SIZE, end * PAGE_SIZE, PAGE_SIZE)

    # -- who holds pages ---------------------------------------------------------------------------

    def pin(self, offset: int, size: int) -> None:
        """Hold pages, as a read(2) into them does while it lasts; as often as wanted."""
        self._pins.update(range(offset, offset + size, PAGE_SIZE))

    def unpin(self, offset: int, size: int) -> None:
        """Undo one :meth:`pin`."""
        self._pins.subtract(range(offset, offset + size, PAGE_SIZE))

    def is_pinned(self, offset: int) -> bool:
        """Whether the page at *offset* is held by anybody."""
        address = self.address + offset
        return self._pins[offset] > 0 or any(
            mapping.memory.address <= address < mapping.memory.address + mapping.memory.size
            for target in self.pinned_by
            for mapping in target.mappings()
        )

    # -- accesses ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Read as the host does; OSError (EFAULT) if a page of it is private."""
        self._check_shared(offset, size)
        return super().read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write as the host does; OSError (EFAULT) and nothing written if a page is private."""
        self._check_shared(offset, len(data))
        super().write(offset, data)

    def _check_shared(self, offset: int, size: int) -> None:
        page = next(self._pages_that_are(offset, size, shared=False), None)
        if page is not None:
            raise OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: page {page:#x} is private")

    def read_as_guest(self, offset: int, size: int) -> bytes:
        """Read as the guest does, whatever the state."""
        return read_fd(self.fd, offset, size)

    def write_as_guest(self, offset: int, data: bytes) -> None:
        """Write as the guest does, whatever the state."""
        write_fd(self.fd, offset, data)
