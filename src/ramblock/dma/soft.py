# SPDX-License-Identifier: Apache-2.0
"""
A software IOMMU: real DMA to real memory through IOVAs, and faults where nothing is mapped.

It refuses as a VFIO type1 container refuses, with the same errno (drivers/vfio/vfio_iommu_type1.c):
EEXIST for an overlap, ENOSPC when the entries are used up, EINVAL for bisecting a mapping. With
``cut`` it behaves as an iommufd IOAS in compat mode with huge pages off. An access holds the lock
from translation to the last byte: an unmap returns when none is under way, which is the guarantee
of an IOTLB flush.
"""

from __future__ import annotations

import ctypes
import errno
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import pairwise
from operator import itemgetter
from threading import Lock
from typing import NamedTuple

from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.errors import DmaError, IommuFault, describe_range
from ramblock.hostmem.backing import read_fd, write_fd
from ramblock.hostmem.host_calls import write_own_memory
from ramblock.process import OfOneProcess
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE, check_granularity, check_positive, check_range

# Enough to look at, not enough for a device that faults forever to fill memory with.
_FAULTS_KEPT = 1024


class Mapping(NamedTuple):
    """One entry of the IOMMU's table."""

    iova: int
    size: int
    memory: HostRange
    writable: bool

    @property
    def end(self) -> int:
        """First IOVA behind it."""
        return self.iova + self.size

    def part(self, start: int, end: int) -> Mapping:
        """Cut out the piece ``[start, end)``."""
        return Mapping(start, end - start, self.memory_of(start, end), self.writable)

    def memory_of(self, start: int, end: int) -> HostRange:
        """Tell where on this host the piece ``[start, end)`` is."""
        skip = start - self.iova
        fd, offset, address, _ = self.memory
        return HostRange(fd, offset + skip, address + skip, end - start)


_iova = itemgetter(0)


class MappingTable:
    """Disjoint mappings, ascending by IOVA: two plain lists. The caller locks."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self.mappings: list[Mapping] = []  #: Ascending, disjoint.

    def __len__(self) -> int:
        return len(self.mappings)

    def overlapping(self, start: int, end: int) -> tuple[int, int]:
        """Find the positions [first, last) that touch [start, end); empty where to insert one."""
        first = bisect_right(self._starts, start)
        if first:
            iova, size, _, _ = self.mappings[first - 1]
            if iova + size > start:
                first -= 1
        return first, bisect_left(self._starts, end, first)

    def replace(self, first: int, last: int, mappings: list[Mapping]) -> None:
        """Put *mappings* in the place of those at positions [first, last)."""
        self._starts[first:last] = map(_iova, mappings)
        self.mappings[first:last] = mappings


class FaultRecord(NamedTuple):
    """A device's access that was refused."""

    iova: int
    size: int
    write: bool


class SoftIommu(OfOneProcess):
    """
    The embedded DMA target.

    :param cut: Whether an unmap may remove a part of a mapping.
    :param max_mappings: How many mappings may exist at once; None: any number.
    :param page_size: Smallest piece it maps, in bytes; a power of two.
    :param exact: Whether an unmap must name one whole mapping, as libvfio-user's servers want it.
    :param iova_ranges: Half-open ranges of addresses that devices can use; None: all of them.
    :raises UsageError: *page_size* is no power of two, or *max_mappings* not positive.
    """

    def __init__(
        self,
        *,
        cut: bool = True,
        max_mappings: int | None = None,
        page_size: int = PAGE_SIZE,
        exact: bool = False,
        iova_ranges: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        check_granularity(page_size, "page size of the IOMMU")
        if max_mappings is not None:
            check_positive(max_mappings, "max_mappings")
        cut = cut and not exact
        #: What it can do.
        self.capabilities = DmaCapabilities(page_size, max_mappings, cut, exact, iova_ranges)
        self._in_page = page_size - 1
        self._lock = Lock()
        self._table = MappingTable()
        #: The latest faults; older ones are forgotten, but counted.
        self.faults: deque[FaultRecord] = deque(maxlen=_FAULTS_KEPT)
        self.fault_count = 0  #: Faults since the beginning.

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Let devices reach *memory* at *iova*; see :meth:`DmaTarget.map`."""
        size, end = memory.size, iova + memory.size
        limit, ranges = self.capabilities.max_mappings, self.capabilities.iova_ranges
        if size <= 0 or iova < 0 or end > ADDRESS_LIMIT or (iova | size) & self._in_page:
            raise self._refusal("map", iova, size)
        if ranges is not None and not any(start <= iova and end <= stop for start, stop in ranges):
            raise self._refusal("map", iova, size, errno.EINVAL, "outside the IOVA ranges")
        with self._lock:
            first, last = self._table.overlapping(iova, end)
            if first < last:
                other = self._table.mappings[first]
                text = f"{describe_range(other.iova, other.size)} is mapped"
                raise self._refusal("map", iova, size, errno.EEXIST, text)
            if limit is not None and len(self._table.mappings) >= limit:
                raise self._refusal("map", iova, size, errno.ENOSPC)
            self._table.replace(first, first, [Mapping(iova, size, memory, writable)])

    def unmap(self, iova: int, size: int) -> int:
        """Take ``[iova, iova + size)`` away from devices; see :meth:`DmaTarget.unmap`."""
        end = iova + size
        if size <= 0 or iova < 0 or end > ADDRESS_LIMIT or (iova | size) & self._in_page:
            raise self._refusal("unmap", iova, size)
        with self._lock:
            position, behind = self._table.overlapping(iova, end)
            hit = self._table.mappings[position:behind]
            if self.capabilities.exact and (len(hit) != 1 or hit[0][:2] != (iova, size)):
                raise self._refusal("unmap", iova, size, errno.ENOENT, "not one whole mapping")
            if not hit:
                return 0
            first, last = hit[0], hit[-1]
            last_end = last.iova + last.size
            rest = []
            if first.iova < iova:
                rest.append(first.part(first.iova, iova))
            if last_end > end:
                rest.append(last.part(end, last_end))
            if rest and not self.capabilities.cut:
                cut = first if first.iova < iova else last
                text = f"it would cut {describe_range(cut.iova, cut.size)}"
                raise self._refusal("unmap", iova, size, errno.EINVAL, text)
            limit = self.capabilities.max_mappings if len(rest) > len(hit) else None
            if limit is not None and len(self._table.mappings) >= limit:
                raise self._refusal("unmap", iova, size, errno.ENOSPC)
            self._table.replace(position, behind, rest)
        removed = min(last_end, end) - max(first.iova, iova)
        for before, after in pairwise(hit):
            removed -= after.iova - before.end
        return removed

    def close(self) -> None:
        """Unmap everything; every later access faults."""
        with self._lock:
            self._table.replace(0, len(self._table.mappings), [])

    def mappings(self) -> list[Mapping]:
        """List the mappings, ascending."""
        with self._lock:
            return list(self._table.mappings)

    def _refusal(
        self, call: str, iova: int, size: int, number: int = errno.EINVAL, text: str = ""
    ) -> DmaError:
        if number == errno.ENOSPC:
            text = f"{len(self._table)} of {self.capabilities.max_mappings} mappings in use"
        elif size <= 0 or iova < 0 or iova + size > ADDRESS_LIMIT:
            text = "empty, or past 2**64"
        text = text or f"not made of pages of {self.capabilities.page_size:#x} bytes"
        where = describe_range(iova, size)
        return DmaError(number, f"{call} {where}: {text}", iova=iova, size=size)

    def read(self, iova: int, size: int) -> bytes:
        """
        Read as a device.

        :raises UsageError: Empty, or past 2**64.
        :raises IommuFault: A byte of it is not mapped; no byte was transferred, and the fault is
            recorded.
        """
        check_range(iova, size, limit=ADDRESS_LIMIT, align=1, what="DMA read")
        with self._lock:
            parts = [_read_host(part) for part in self._translate(iova, size, write=False)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, iova: int, data: bytes) -> None:
        """
        Write as a device.

        :raises UsageError: No data, or past 2**64.
        :raises IommuFault: A byte of it is not mapped, or mapped read-only; no byte was
            transferred.
        """
        check_range(iova, len(data), limit=ADDRESS_LIMIT, align=1, what="DMA write")
        with self._lock:
            done = 0
            for part in self._translate(iova, len(data), write=True):
                _write_host(part, data[done : done + part.size])
                done += part.size

    def _translate(self, iova: int, size: int, *, write: bool) -> list[HostRange]:
        # All the bytes, or a fault. Ranges that continue each other are joined: under one mapping
        # per page, an access of 64 KiB is one copy.
        parts: list[HostRange] = []
        position, end = iova, iova + size
        first, last = self._table.overlapping(iova, end)
        for mapping in self._table.mappings[first:last]:
            if mapping.iova > position or (write and not mapping.writable):
                break
            stop = min(end, mapping.end)
            part = mapping.memory_of(position, stop)
            position = stop
            if parts:
                fd, offset, address, length = parts[-1]
                if part[:3] == (fd, offset + length, address + length):
                    parts[-1] = HostRange(fd, offset, address, length + part.size)
                    continue
            parts.append(part)
        if position < end:
            self.fault_count += 1
            self.faults.append(FaultRecord(iova, size, write))
            access = f"device {'write to' if write else 'read from'} {describe_range(iova, size)}"
            text = f"{access}: {position:#x} may not be reached"
            raise IommuFault(text, iova=iova, size=size, write=write)
        return parts

    def __repr__(self) -> str:
        return f"<SoftIommu at {id(self):#x}: {len(self._table.mappings)} mappings>"


def _read_host(memory: HostRange) -> bytes:
    if memory.fd is not None:
        # Not through the mapping: a load from a hole would allocate it.
        return read_fd(memory.fd, memory.offset, memory.size)
    # Not string_at(): it takes a C int, and cuts off what is larger without a word.
    return (ctypes.c_char * memory.size).from_address(memory.address).raw


def _write_host(memory: HostRange, data: bytes) -> None:
    if memory.fd is not None:
        try:
            write_fd(memory.fd, memory.offset, data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            write_own_memory(memory.address, data)  # hugetlbfs has no write(2)
    else:
        ctypes.memmove(memory.address, data, len(data))
