"""
A DMA target, a discard source and a listener of one's own, written from the reference alone.

The documentation shows this file; tests/test_own_parts.py runs the conformance kit on it.
"""

# [target]
import ctypes
import errno

from ramblock.dma import DmaCapabilities, HostRange
from ramblock.errors import DmaError, IommuFault


class DictTarget:
    """Maps page by page, into a dictionary, so any part of a mapping can go."""

    capabilities = DmaCapabilities(cut=True)

    def __init__(self) -> None:
        self.table: dict[int, tuple[int, bool]] = {}

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        if (iova | memory.size) % 4096 or iova + memory.size > 1 << 64:
            raise DmaError(errno.EINVAL, "not made of pages", iova=iova, size=memory.size)
        pages = range(iova, iova + memory.size, 4096)
        if any(page in self.table for page in pages):
            raise DmaError(errno.EEXIST, "mapped already", iova=iova, size=memory.size)
        self.table.update({page: (memory.address + page - iova, writable) for page in pages})

    def unmap(self, iova: int, size: int) -> int:
        gone = [self.table.pop(page, None) for page in range(iova, iova + size, 4096)]
        return 4096 * sum(entry is not None for entry in gone)

    def close(self) -> None:
        self.table.clear()


# [device]
class DictDevice:
    """A device behind a DictTarget: reaches what the dictionary says."""

    def __init__(self, target: DictTarget) -> None:
        self.table = target.table

    def _find(self, iova: int, size: int, *, write: bool) -> list[int]:
        entries = [self.table.get((iova + n) & -4096, (0, False)) for n in range(size)]
        if any(not address or (write and not writable) for address, writable in entries):
            raise IommuFault("not mapped", iova=iova, size=size, write=write)
        return [address + (iova + n) % 4096 for n, (address, _) in enumerate(entries)]

    def read(self, iova: int, size: int) -> bytes:
        return b"".join(ctypes.string_at(at, 1) for at in self._find(iova, size, write=False))

    def write(self, iova: int, data: bytes) -> None:
        for at, byte in zip(self._find(iova, len(data), write=True), data, strict=True):
            ctypes.memset(at, byte, 1)


# [source]
from ramblock import RamBlock  # noqa: E402 - each part of this file is shown by itself
from ramblock.errors import UsageError  # noqa: E402


class Balloon:
    """Pages that the guest has given up, one by one, until it takes them back."""

    granularity = 4096

    def __init__(self, block: RamBlock) -> None:
        self.given_up: set[int] = set()
        self.manager = block.discard_manager
        self.manager.add_source(self)

    def is_populated(self, offset: int, size: int) -> bool:
        return self.given_up.isdisjoint(range(offset & -4096, offset + size, 4096))

    def inflate(self, offset: int, size: int) -> None:
        pages = set(range(offset, offset + size, 4096))
        if pages & self.given_up:
            raise UsageError(f"{offset:#x}: some of it is given up already")
        self.given_up |= pages
        try:
            self.manager.notify_discard(self, offset, size)
        except BaseException:
            self.given_up -= pages
            raise

    def deflate(self, offset: int, size: int) -> None:
        pages = set(range(offset, offset + size, 4096))
        if not pages <= self.given_up:
            raise UsageError(f"{offset:#x}: not all of it is given up")
        self.given_up -= pages
        try:
            self.manager.notify_populate(self, offset, size)
        except BaseException:
            self.given_up |= pages
            raise


# [listener]
from ramblock import RamSection  # noqa: E402


class Migration:
    """Remembers which pages of a block may be sent to another host."""

    def __init__(self, *, most: int) -> None:
        self.most = most
        self.pages: set[int] = set()

    def notify_populate(self, section: RamSection) -> None:
        pages = range(section.offset, section.end, 4096)
        if len(self.pages) + len(pages) > self.most:
            raise MemoryError(f"no room for {section!r}")
        self.pages.update(pages)

    def notify_discard(self, section: RamSection) -> None:
        self.pages.difference_update(range(section.offset, section.end, 4096))

    def held(self) -> list[tuple[int, int]]:
        return [(page, 4096) for page in self.pages]


# [end]
