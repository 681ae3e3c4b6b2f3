"""
A small vfio-user server for tests of the client: keeps windows as libvfio-user does, and misbehaves
on request.

It runs on a thread of its own on the other end of a socket pair. Memory that came without a
descriptor it reads and writes by message, from that thread.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ramblock.dma import DmaCapabilities, HostRange
from ramblock.dma.soft import Mapping
from ramblock.dma.vfio_user import (
    OWN_CAPABILITIES,
    Capabilities,
    Descriptors,
    Link,
    Outgoing,
    Reply,
    Request,
    Role,
    VfioUserTarget,
)
from ramblock.dma.vfio_user.events import NEED_DATA
from ramblock.dma.vfio_user.messages import (
    DeviceInfoReply,
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    ErrorReply,
    GetDeviceInfo,
    GetRegionInfo,
    Message,
    RegionInfoReply,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
    Reset,
    ResetReply,
    Version,
    VersionReply,
)
from ramblock.dma.vfio_user.numbers import DmaFlags
from ramblock.errors import IommuFault, ProtocolError
from ramblock.uapi.vfio import DeviceFlags, RegionFlags

__all__ = ["RemoteIommu", "Server", "Window", "served"]

#: Bytes of region 0.
REGION_SIZE = 0x1000

#: Looks at a request before the server does: the answer to give instead, an errno, or None to go on
#: as usual.
Hook = Callable[["Server", Request], Message | int | Outgoing | None]


class Window(NamedTuple):
    size: int
    flags: int
    offset: int
    fds: Descriptors


class Server:
    """
    :param sock: Its end.
    :param hook: Looks at each request first.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        capabilities: Capabilities = OWN_CAPABILITIES,
        hook: Hook | None = None,
    ) -> None:
        self.link = Link(sock, Role.SERVER, capabilities)
        self.hook = hook
        self.windows: dict[int, Window] = {}
        self.region = bytearray(REGION_SIZE)
        self.resets = 0
        self.requests: list[Message] = []
        self.error: BaseException | None = None
        self._tasks: deque[tuple[Message, Future[Message | ErrorReply]]] = deque()
        self._asked: dict[int, Future[Message | ErrorReply]] = {}
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._dying = False
        # Held while the device reaches memory: an unmap is answered when no access is under way.
        self._lock = threading.Lock()
        #: Does nothing while this is not set.
        self.awake = threading.Event()
        self.awake.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- other threads -----------------------------------------------------------------------------

    def ask(self, message: Message) -> Message | ErrorReply:
        """Have the client asked, and wait for its answer."""
        future: Future[Message | ErrorReply] = Future()
        self._tasks.append((message, future))
        os.eventfd_write(self._bell, 1)
        return future.result(timeout=20)

    def die(self) -> None:
        """Go without a word."""
        self._dying = True
        os.eventfd_write(self._bell, 1)
        self.awake.set()

    def join(self) -> None:
        self.awake.set()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        with suppress(OSError):
            os.close(self._bell)
        self._bell = -1

    # -- its thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except (OSError, ProtocolError) as error:
            self.error = error
        finally:
            self.link.close()
            for window in self.windows.values():
                window.fds.close()
            for future in self._asked.values():
                future.set_exception(EOFError())

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        poller.register(self.link, select.POLLIN)
        while not self._dying:
            self.awake.wait()
            while self._tasks:
                message, future = self._tasks.popleft()
                outgoing = self.link.connection.request(message)
                self._asked[outgoing.message_id] = future
                self.link.send(outgoing, 20)
            event = self.link.event()
            if isinstance(event, Request):
                with event:
                    self._answer(event)
            elif isinstance(event, Reply):
                with event:
                    self._asked.pop(event.message_id).set_result(event.message)
            elif event is not NEED_DATA:
                return
            else:
                poller.poll()
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)

    def _answer(self, request: Request) -> None:
        self.requests.append(request.message)
        answer = None if self.hook is None else self.hook(self, request)
        if answer is None:
            answer = self.carry_out(request)
        if request.no_reply or self._dying:
            return
        connection = self.link.connection
        if isinstance(answer, int):
            answer = connection.error(request, answer)
        elif isinstance(answer, Message):
            answer = connection.reply(request, answer)
        self.link.send(answer, 20)

    def carry_out(self, request: Request) -> Message | int:
        message = request.message
        match message:
            case Version():
                return VersionReply(0, 0, self.link.connection.own)
            case DmaMap():
                return self._map(message, request.fds)
            case DmaUnmap():
                window = self.windows.get(message.address)
                if window is None or window.size != message.size:
                    return errno.ENOENT
                with self._lock:
                    del self.windows[message.address]
                    window.fds.close()
                return DmaUnmapReply(message.flags, message.address, message.size)
            case GetDeviceInfo():
                return DeviceInfoReply(16, DeviceFlags.VFIO_DEVICE_FLAGS_PCI, 2, 0)
            case GetRegionInfo() if message.index < 2:
                size = REGION_SIZE if message.index == 0 else 0
                flags = RegionFlags.VFIO_REGION_INFO_FLAG_READ if size else 0
                return RegionInfoReply(32, flags, message.index, 0, size, 0)
            case RegionRead(region=0, offset=offset, count=count) if offset < REGION_SIZE:
                return RegionReadReply(0, offset, bytes(self.region[offset : offset + count]))
            case RegionWrite(region=0, offset=offset, data=data) if offset < REGION_SIZE:
                self.region[offset : offset + len(data)] = data
                return RegionWriteReply(0, offset, len(data))
            case Reset():
                self.resets += 1
                return ResetReply()
        return errno.EINVAL if type(message).__name__ != "UnknownRequest" else errno.ENOTSUP

    def _map(self, message: DmaMap, fds: Descriptors) -> Message | int:
        for start, window in self.windows.items():
            if message.address < start + window.size and start < message.address + message.size:
                return errno.EEXIST
        if len(self.windows) >= self.link.connection.own.max_dma_maps:
            return errno.ENOSPC
        mine = Descriptors(fds.take_all(), os.close)
        with self._lock:
            self.windows[message.address] = Window(
                message.size, message.flags, message.offset, mine
            )
        return DmaMapReply()

    # -- its device --------------------------------------------------------------------------------

    def read(self, iova: int, size: int) -> bytes:
        with self._lock:
            parts = self._find(iova, size, write=False)
            if parts is not None:
                return b"".join([os.pread(fd, count, offset) for fd, offset, count in parts])
        answer = self.ask(DmaRead(iova, size))
        if isinstance(answer, ErrorReply):
            raise IommuFault(os.strerror(answer.errno), iova=iova, size=size, write=False)
        assert isinstance(answer, DmaReadReply)
        return answer.data

    def write(self, iova: int, data: bytes) -> None:
        with self._lock:
            parts = self._find(iova, len(data), write=True)
            if parts is not None:
                for fd, offset, count in parts:
                    os.pwrite(fd, data[:count], offset)
                    data = data[count:]
                return
        answer = self.ask(DmaWrite(iova, data))
        if isinstance(answer, ErrorReply):
            raise IommuFault(os.strerror(answer.errno), iova=iova, size=len(data), write=True)

    def _find(self, iova: int, size: int, *, write: bool) -> list[tuple[int, int, int]] | None:
        """
        Where the bytes are, as (descriptor, offset, size).

        None: some window has no descriptor.
        """
        parts, position, end = [], iova, iova + size
        by_message = False
        for start, window in sorted(self.windows.items()):
            stop = min(start + window.size, end)
            if start <= position < stop and (window.flags & DmaFlags.WRITE or not write):
                fd = next(iter(window.fds), -1)
                by_message = by_message or fd < 0
                parts.append((fd, window.offset + position - start, stop - position))
                position = stop
        if position < end:
            raise IommuFault("nothing there", iova=iova, size=size, write=write)
        return None if by_message else parts


class RemoteIommu:
    """
    A server and the target that drives it, with the face of a SoftIommu, so that the same tests can
    run on both.
    """

    def __init__(
        self,
        *,
        capabilities: Capabilities = OWN_CAPABILITIES,
        hook: Hook | None = None,
        timeout: float = 20.0,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.server = Server(theirs, capabilities=capabilities, hook=hook)
        self.target = VfioUserTarget(ours, timeout=timeout)

    @property
    def capabilities(self) -> DmaCapabilities:
        return self.target.capabilities

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        self.target.map(iova, memory, writable=writable)

    def unmap(self, iova: int, size: int) -> int:
        return self.target.unmap(iova, size)

    def mappings(self) -> list[Mapping]:
        """What both sides say, where no call is under way."""
        windows = sorted((iova, window.size) for iova, window in self.server.windows.items())
        found = self.target.mappings()
        assert [mapping[:2] for mapping in found] == windows
        return found

    def read(self, iova: int, size: int) -> bytes:
        return self.server.read(iova, size)

    def write(self, iova: int, data: bytes) -> None:
        self.server.write(iova, data)

    def close(self) -> None:
        try:
            self.target.close()
        finally:
            self.server.join()


@contextmanager
def served(
    *,
    capabilities: Capabilities = OWN_CAPABILITIES,
    hook: Hook | None = None,
    timeout: float = 20.0,
) -> Iterator[RemoteIommu]:
    """A target with its server, both gone afterwards."""
    iommu = RemoteIommu(capabilities=capabilities, hook=hook, timeout=timeout)
    try:
        yield iommu
    finally:
        iommu.server.awake.set()
        iommu.close()
