# SPDX-License-Identifier: Apache-2.0
"""
The memory that a server reaches by message: a client's own windows, and the memory in them.

Only the thread that talks to the server touches it, so that an access is over before the next
message is looked at: no lock, and least of all the memory's.
"""

from __future__ import annotations

import errno
import logging
from collections import deque

from ramblock.dma.soft import FaultRecord, Mapping, MappingTable
from ramblock.dma.target import HostRange
from ramblock.dma.vfio_user.layout import Message
from ramblock.dma.vfio_user.numbers import command_name
from ramblock.dma.vfio_user.replies import DmaReadReply, DmaWriteReply
from ramblock.dma.vfio_user.requests import DmaRead, DmaWrite, InvalidRequest
from ramblock.errors import DmaError, describe_range
from ramblock.hostmem.backing import read_fd, write_fd
from ramblock.hostmem.host_calls import read_own_memory, write_own_memory
from ramblock.logs import Sparingly

__all__ = ["ServedMemory"]

_log = logging.getLogger(__name__)

# Enough to look at, not enough for a server that goes astray forever to fill memory with.
_VIOLATIONS_KEPT = 1024


class ServedMemory:
    """
    Windows by IOVA.

    :param max_mappings: How many the server takes.
    """

    def __init__(self, max_mappings: int) -> None:
        self._table = MappingTable()
        self._limit = max_mappings
        self._log_violation = Sparingly(_log)
        #: Accesses of the server that were refused, the latest; older ones are forgotten, but
        #: counted.
        self.violations: deque[FaultRecord] = deque(maxlen=_VIOLATIONS_KEPT)
        #: How many there were, and commands that make no sense.
        self.violation_count = 0

    def mappings(self) -> list[Mapping]:
        """List the windows, ascending; any thread may ask."""
        return list(self._table.mappings)

    def add(self, mapping: Mapping) -> None:
        """
        Let the server reach *mapping*.

        :raises DmaError: EEXIST: a window is there; the text says which. ENOSPC: the server takes
            no more. Nothing has changed.
        """
        first, last = self._table.overlapping(mapping.iova, mapping.end)
        if first < last:
            other = self._table.mappings[first]
            raise _refusal(mapping, errno.EEXIST, f"{describe_range(*other[:2])} is mapped")
        if len(self._table) >= self._limit:
            raise _refusal(mapping, errno.ENOSPC, f"all {self._limit} windows are in use")
        self._table.replace(first, first, [mapping])

    def find(self, iova: int, size: int) -> Mapping | None:
        """Look up the window that is exactly this one."""
        first, last = self._table.overlapping(iova, iova + size)
        if last - first == 1 and self._table.mappings[first][:2] == (iova, size):
            return self._table.mappings[first]
        return None

    def clear(self) -> None:
        """Take all windows away."""
        self._table.replace(0, len(self._table), [])

    def remove(self, mapping: Mapping) -> None:
        """Take a window away, if it is still there."""
        if self.find(mapping.iova, mapping.size) is mapping:
            first, _ = self._table.overlapping(mapping.iova, mapping.end)
            self._table.replace(first, first + 1, [])

    # -- the server's requests ---------------------------------------------------------------------

    def serve(self, message: Message) -> Message | int:
        """Carry out a request of the server; the answer, or the errno of a refusal."""
        if isinstance(message, DmaRead):
            data = self._read(message.address, message.count)
            return data if isinstance(data, int) else DmaReadReply(message.address, data)
        if isinstance(message, DmaWrite):
            number = self._write(message.address, message.data)
            return number or DmaWriteReply(message.address, len(message.data))
        if isinstance(message, InvalidRequest):
            self.violation_count += 1
            self._log_violation(
                "server sends %s: %s", command_name(message.command), message.reason
            )
            return errno.EINVAL
        return errno.ENOTSUP

    def _read(self, iova: int, size: int) -> bytes | int:
        parts = self._translate(iova, size, write=False)
        if parts is None:
            return errno.EFAULT
        try:
            return b"".join([_read_host(part) for part in parts])
        except (OSError, EOFError):
            # The memory is not all there: a file that was made shorter. No other number would tell
            # the server more.
            return errno.EFAULT

    def _write(self, iova: int, data: bytes) -> int:
        parts = self._translate(iova, len(data), write=True)
        if parts is None:
            return errno.EFAULT
        done = 0
        try:
            for part in parts:
                _write_host(part, data[done : done + part.size])
                done += part.size
        except OSError:
            return errno.EFAULT
        return 0

    def _translate(self, iova: int, size: int, *, write: bool) -> list[HostRange] | None:
        """Where the bytes are, all of them; None: not reachable, which is put on record."""
        parts: list[HostRange] = []
        position, end = iova, iova + size
        first, last = self._table.overlapping(iova, end)
        for mapping in self._table.mappings[first:last]:
            if mapping.iova > position or (write and not mapping.writable):
                break
            stop = min(end, mapping.end)
            parts.append(mapping.memory_of(position, stop))
            position = stop
        if position >= end:
            return parts
        self.violation_count += 1
        self.violations.append(FaultRecord(iova, size, write))
        self._log_violation(
            "server %s %s: %#x may not be reached",
            "writes" if write else "reads", describe_range(iova, size), position,
        )  # fmt: skip
        return None


def _refusal(mapping: Mapping, number: int, text: str) -> DmaError:
    iova, size = mapping.iova, mapping.size
    return DmaError(number, f"map {describe_range(iova, size)}: {text}", iova=iova, size=size)


def _read_host(memory: HostRange) -> bytes:
    if memory.fd is not None:
        return read_fd(memory.fd, memory.offset, memory.size)
    return read_own_memory(memory.address, memory.size)


def _write_host(memory: HostRange, data: bytes) -> None:
    if memory.fd is not None:
        try:
            write_fd(memory.fd, memory.offset, data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return
    # hugetlbfs has no write(2).
    write_own_memory(memory.address, data)
