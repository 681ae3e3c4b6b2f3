# SPDX-License-Identifier: Apache-2.0
"""
Parts of a message that is not complete yet: bytes, and descriptors with their place among them.

A descriptor belongs to the message in whose bytes it arrived. Descriptors come with a chunk of the
stream, and a chunk may hold the end of one message and the start of the next, so they count as come
with its first byte. A reader of a socket stays exact by never reading beyond the end of a message
(``wanted``): the kernel hands descriptors out with the first byte of the data that they were sent
with (net/unix/af_unix.c, unix_stream_read_generic()).
"""

from __future__ import annotations

from collections.abc import Iterable

from ramblock.dma.vfio_user.descriptors import CloseDescriptor
from ramblock.dma.vfio_user.header import Header
from ramblock.dma.vfio_user.numbers import HEADER_SIZE

__all__ = ["Inbox"]


class Inbox:
    """
    Bytes and descriptors in their order.

    :param close: Closes a descriptor.
    """

    def __init__(self, close: CloseDescriptor) -> None:
        self._close = close
        self._data = bytearray()
        # Where in the stream, and which; ascending.
        self._batches: list[tuple[int, list[int]]] = []
        #: Where the next message begins, in bytes of the whole stream.
        self.offset = 0

    def __len__(self) -> int:
        return len(self._data)

    @property
    def descriptors(self) -> int:
        """How many descriptors wait for their message."""
        return sum(len(numbers) for _, numbers in self._batches)

    def add(self, data: bytes, fds: Iterable[int]) -> None:
        """Take a chunk in; its descriptors belong to this object from now on."""
        numbers = list(fds)
        if numbers:
            self._batches.append((self.offset + len(self._data), numbers))
        self._data += data

    def header(self) -> Header | None:
        """Read the header of the next message; None: it is not complete."""
        return Header.unpack(self._data) if len(self._data) >= HEADER_SIZE else None

    def take(self, size: int) -> tuple[bytes, list[int]]:
        """Take a message of *size* bytes, all here: payload and descriptors, now the caller's."""
        payload = bytes(memoryview(self._data)[HEADER_SIZE:size])
        del self._data[:size]
        self.offset += size
        numbers: list[int] = []
        while self._batches and self._batches[0][0] < self.offset:
            numbers += self._batches.pop(0)[1]
        return payload, numbers

    def close(self) -> None:
        """Forget the bytes and close the descriptors."""
        self._data.clear()
        while self._batches:
            numbers = self._batches[-1][1]
            while numbers:
                self._close(numbers.pop())
            self._batches.pop()

    def __del__(self) -> None:
        self.close()
