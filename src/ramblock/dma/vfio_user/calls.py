# SPDX-License-Identifier: Apache-2.0
"""
One request on its way from the thread that makes it to the thread that talks to the server.

The thread that made it may be gone when the answer comes (Ctrl-C). The call is carried to its end
all the same, so that the table of windows matches the server's.
"""

from __future__ import annotations

import errno
from threading import Lock

from ramblock.dma.soft import Mapping
from ramblock.dma.vfio_user.layout import Message
from ramblock.dma.vfio_user.numbers import DmaFlags, DmaUnmapFlags
from ramblock.dma.vfio_user.replies import DmaUnmapReply, ErrorReply
from ramblock.dma.vfio_user.requests import (
    DmaMap,
    DmaUnmap,
    RegionRead,
    RegionWrite,
    RegionWriteMulti,
    Reset,
)
from ramblock.dma.vfio_user.serving import ServedMemory
from ramblock.errors import DmaError, RemoteProtocolError, describe_range

__all__ = ["Call", "MapCall", "UnmapAllCall", "UnmapCall"]

# Within these a device may do DMA, and wait for it before it answers.
_RUNS_THE_DEVICE = (RegionRead, RegionWrite, RegionWriteMulti, Reset)


class Call:
    """
    A request, and its outcome.

    :param message: The request.
    :param fds: Descriptors that go along; they stay the caller's, as the memory behind them does.
    """

    def __init__(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        self.message = message
        self.fds = fds
        #: Whether the device may do DMA before it answers.
        self.runs_the_device = isinstance(message, _RUNS_THE_DEVICE)
        #: The server's answer.
        self.answer: Message | ErrorReply | None = None
        #: Why it was not sent.
        self.error: Exception | None = None
        #: Whether the server may know of it.
        self.sent = False
        # Not an Event: taken and released by one instruction each, it is whole after Ctrl-C.
        self._pending = Lock()
        self._pending.acquire()

    def begin(self, memory: ServedMemory) -> None:
        """
        Get ready for being sent, on the server's thread.

        :raises DmaError: It is refused, and not sent.
        """

    def end(self, memory: ServedMemory, answer: Message | ErrorReply) -> None:
        """
        Draw the consequences of the answer, on the server's thread.

        :raises RemoteProtocolError: It is none that can be worked with.
        """

    def finish(
        self, *, answer: Message | ErrorReply | None = None, error: Exception | None = None
    ) -> None:
        """Wake who waits for it. Once; without arguments: the conversation is over."""
        self.answer, self.error = answer, error
        self._pending.release()

    def wait(self, timeout: float) -> bool:
        """Wait until it is finished, in seconds; tell whether it is. One thread, once."""
        return self._pending.acquire(timeout=timeout)


class MapCall(Call):
    """DMA_MAP: the server may use the window from the moment when the message is sent."""

    def __init__(self, mapping: Mapping, *, with_descriptor: bool) -> None:
        memory = mapping.memory
        fds = (memory.fd,) if with_descriptor and memory.fd is not None else ()
        flags = DmaFlags.READ | (DmaFlags.WRITE if mapping.writable else 0)
        offset = memory.offset if fds else 0
        super().__init__(DmaMap(flags, offset, mapping.iova, mapping.size), fds)
        self.mapping = mapping

    def begin(self, memory: ServedMemory) -> None:
        """Open the window."""
        memory.add(self.mapping)

    def end(self, memory: ServedMemory, answer: Message | ErrorReply) -> None:
        """Close it again if the server does not want it."""
        if isinstance(answer, ErrorReply):
            memory.remove(self.mapping)


class UnmapCall(Call):
    """DMA_UNMAP: the window is served until the server has answered."""

    def __init__(self, iova: int, size: int) -> None:
        super().__init__(DmaUnmap(0, iova, size))
        self._iova = iova
        self._size = size
        self._mapping: Mapping | None = None

    def begin(self, memory: ServedMemory) -> None:
        """Find the window."""
        self._mapping = memory.find(self._iova, self._size)
        if self._mapping is None:
            raise DmaError(
                errno.ENOENT,
                f"unmap {describe_range(self._iova, self._size)}: not one whole window",
                iova=self._iova, size=self._size,
            )  # fmt: skip

    def end(self, memory: ServedMemory, answer: Message | ErrorReply) -> None:
        """Close the window, if the server has let go of it, and of all of it."""
        if not isinstance(answer, DmaUnmapReply):
            return
        if answer.size != self._size:
            raise RemoteProtocolError(
                f"unmap {describe_range(self._iova, self._size)}: "
                f"the server unmapped {answer.size:#x} bytes, not {self._size:#x}",
                command=answer.command,
            )
        assert self._mapping is not None
        memory.remove(self._mapping)


class UnmapAllCall(Call):
    """DMA_UNMAP of every window at once, where the server knows that."""

    def __init__(self) -> None:
        super().__init__(DmaUnmap(DmaUnmapFlags.ALL, 0, 0))

    def end(self, memory: ServedMemory, answer: Message | ErrorReply) -> None:
        """Close all windows, if the server has let go of them."""
        if isinstance(answer, DmaUnmapReply) and answer.flags & DmaUnmapFlags.ALL:
            memory.clear()
