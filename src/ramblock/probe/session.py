# SPDX-License-Identifier: Apache-2.0
"""One client of a probe, from VERSION to its end: its requests are answered and checked."""

from __future__ import annotations

import errno
from collections import deque
from time import monotonic

from ramblock.dma.vfio_user import CLOSED, NEED_DATA, Capabilities, Link, Outgoing, Reply, Request
from ramblock.dma.vfio_user.messages import (
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    ErrorReply,
    Message,
    Version,
    VersionReply,
)
from ramblock.dma.vfio_user.numbers import DmaFlags, DmaUnmapFlags
from ramblock.errors import LocalProtocolError, RemoteProtocolError
from ramblock.probe.device import ProbeDevice
from ramblock.probe.engine import DmaRefusedError
from ramblock.probe.record import Record, Violation
from ramblock.probe.windows import Rule, RuleBroken, UnmapRule, Window, WindowTable

__all__ = ["CAPABILITIES", "Session", "SessionEnded"]

#: The probe's announcement. The limit on windows is type1's, which VMMs know.
CAPABILITIES = Capabilities(max_msg_fds=8, max_dma_maps=65535, write_multiple=True)

# Plain numbers: the complement of an IntFlag has no bits but those that have names.
_MAP_FLAGS = int(DmaFlags.READ | DmaFlags.WRITE)
_UNMAP_FLAGS = int(DmaUnmapFlags.ALL)
# A client that is alive answers within this; an emulated one on a busy machine as well.
_TIMEOUT_SECONDS = 10.0
# Requests that may come in while the client owes us an answer.
_MOST_WAITING = 1024
# Requests that are looked at in one go: the probe has other things to do as well.
_BATCH = 64


class SessionEnded(Exception):
    """
    The session is over.

    :ivar bad: Whether the client broke the protocol.
    """

    def __init__(self, reason: str, *, bad: bool = False) -> None:
        super().__init__(reason)
        self.bad = bad


class Session:
    """
    Serves one client. Not for several threads.

    :param link: The connection; closed by :meth:`close`.
    :param rule: The rule for an unmap.
    :param max_windows: How many windows there may be. The client is told its usual number, and
        meets this one as a refusal.
    """

    def __init__(
        self,
        link: Link,
        record: Record,
        rule: UnmapRule,
        max_windows: int = CAPABILITIES.max_dma_maps,
    ) -> None:
        self._link = link
        self._record = record
        self.name = record.connected()
        self.table = WindowTable(rule, max_windows)
        self._device = ProbeDevice(self)
        self._waiting: deque[Request] = deque()

    def fileno(self) -> int:
        """Tell the socket, for polling."""
        return self._link.fileno()

    @property
    def bus_master(self) -> bool:
        """Whether the device's driver allows DMA."""
        return self._device.bus_master

    @property
    def has_more(self) -> bool:
        """Whether something is to be done although nothing may have arrived."""
        return bool(self._waiting)

    # -- requests ----------------------------------------------------------------------------------

    def serve(self) -> bool:
        """
        Answer the requests that have arrived, up to a number.

        :return: Whether there may be more.
        :raises SessionEnded: The client has left, or has to.
        """
        for _ in range(_BATCH):
            event = self._waiting.popleft() if self._waiting else self._next()
            if event is None:
                return False
            with event:
                if isinstance(event, Reply):
                    raise SessionEnded("an answer that nobody waits for", bad=True)
                self._answer(event)
        return True

    def _next(self) -> Request | Reply | None:
        try:
            event = self._link.event()
        except RemoteProtocolError as error:
            raise SessionEnded(str(error), bad=True) from None
        except OSError as error:
            raise SessionEnded(f"connection lost: {error.strerror}") from None
        if event is CLOSED:
            raise SessionEnded("closed by the client")
        return None if event is NEED_DATA else event

    def _answer(self, request: Request) -> None:
        connection = self._link.connection
        answer = self._carry_out(request)
        if request.no_reply:
            return
        if isinstance(answer, int):
            self._send(connection.error(request, answer))
            return
        try:
            outgoing = connection.reply(request, answer)
        except LocalProtocolError:
            # More of its own request than the client takes.
            outgoing = connection.error(request, errno.EINVAL)
        self._send(outgoing)

    def _send(self, outgoing: Outgoing) -> None:
        try:
            self._link.send(outgoing, _TIMEOUT_SECONDS)
        except TimeoutError:
            raise SessionEnded("the client does not read", bad=True) from None
        except OSError as error:
            raise SessionEnded(f"connection lost: {error.strerror}") from None

    def _carry_out(self, request: Request) -> Message | int:
        message = request.message
        match message:
            case Version():
                if message.major:
                    return errno.EINVAL
                peer = self._link.connection.peer
                self._record.emit("connect", target=self.name, max_msg_fds=peer.max_msg_fds)
                return VersionReply(0, 0, CAPABILITIES)
            case DmaMap():
                return self._map(message, request)
            case DmaUnmap():
                return self._unmap(message)
        return self._device.carry_out(message)

    # -- windows -----------------------------------------------------------------------------------

    def _map(self, message: DmaMap, request: Request) -> Message | int:
        try:
            window = self._add(message, request)
        except RuleBroken as error:
            return self._broke(error, message.address, message.size)
        self._record.mapped(self.name, window, len(self.table))
        return DmaMapReply()

    def _add(self, message: DmaMap, request: Request) -> Window:
        flags = message.flags
        if flags & ~_MAP_FLAGS:
            raise RuleBroken(Rule.NO_ACCESS, errno.EINVAL, f"flags {flags:#x} of a map")
        file = None
        if len(request.fds):
            try:
                file = self.table.files.add(request.fds.take)
            except ValueError as error:
                raise RuleBroken(Rule.NOT_MEMORY, errno.EINVAL, str(error)) from None
        try:
            return self.table.add(
                message.address,
                message.size,
                readable=bool(flags & DmaFlags.READ),
                writable=bool(flags & DmaFlags.WRITE),
                file=file,
                offset=message.offset,
            )
        except BaseException:
            if file is not None:
                self.table.files.drop(file)
            raise

    def _unmap(self, message: DmaUnmap) -> Message | int:
        address, size, flags = message.address, message.size, message.flags
        if flags & ~_UNMAP_FLAGS:
            return errno.ENOTSUP
        try:
            if flags:
                if address or size:
                    raise RuleBroken(
                        Rule.EMPTY, errno.EINVAL, "an unmap of everything names a range as well"
                    )
                removed = self.table.remove_all()
            else:
                removed = self.table.remove(address, size)
        except RuleBroken as error:
            number = self._broke(error, address, size)
            for window in self.table.windows:
                if window.stale:
                    self._record.became_stale(self.name, window)
            return number
        self._record.unmapped(self.name, address, size, removed)
        return DmaUnmapReply(flags, address, sum(window.size for window in removed))

    def _broke(self, error: RuleBroken, address: int | None, size: int | None) -> int:
        self._record.violation(
            Violation(self.name, error.rule, address, size, error.errno, str(error))
        )
        return error.errno

    # -- the device's DMA --------------------------------------------------------------------------

    def read(self, address: int, size: int) -> bytes:
        """
        Read as the device.

        :raises DmaRefusedError: EFAULT: it is not mapped. EIO: it is, and the memory is not there.
        :raises SessionEnded: The client did not answer.
        """
        parts = self._translate(address, size, write=False)
        return b"".join(self._read_part(*part) for part in parts)

    def write(self, address: int, data: bytes) -> None:
        """Write as the device; raises as :meth:`read`, and some of it may be written then."""
        done = 0
        for window, offset, size in self._translate(address, len(data), write=True):
            self._write_part(window, offset, data[done : done + size])
            done += size

    def _translate(self, address: int, size: int, *, write: bool) -> list[tuple[Window, int, int]]:
        self._record.counts["dma"] += 1
        parts = self.table.translate(address, size, write=write)
        if not parts:
            self._record.fault(self.name, address, size, write=write)
            raise DmaRefusedError(errno.EFAULT)
        return parts

    def _read_part(self, window: Window, offset: int, size: int) -> bytes:
        address = window.address + offset
        if window.file is not None:
            try:
                return window.file.read(window.offset + offset, size)
            except OSError as error:
                raise self._unreachable(address, size, str(error)) from None
        data = b""
        step = self._link.connection.peer.max_data_xfer_size
        while len(data) < size:
            count = min(size - len(data), step)
            reply = self._ask(DmaRead(address + len(data), count))
            if not isinstance(reply, DmaReadReply):
                raise self._unreachable(address, size, f"the client answers {reply}")
            data += reply.data
        return data

    def _write_part(self, window: Window, offset: int, data: bytes) -> None:
        address = window.address + offset
        if window.file is not None:
            try:
                window.file.write(window.offset + offset, data)
            except OSError as error:
                raise self._unreachable(address, len(data), str(error)) from None
            return
        step = self._link.connection.peer.max_data_xfer_size
        for done in range(0, len(data), step):
            reply = self._ask(DmaWrite(address + done, data[done : done + step]))
            if isinstance(reply, ErrorReply):
                raise self._unreachable(address, len(data), f"the client answers {reply}")

    def _unreachable(self, address: int, size: int, text: str) -> DmaRefusedError:
        """Note that a window is there and its memory is not."""
        self._broke(RuleBroken(Rule.UNREACHABLE, errno.EIO, text), address, size)
        return DmaRefusedError(errno.EIO)

    def _ask(self, message: Message) -> Message | ErrorReply:
        """Ask the client, and wait; its requests of the meantime wait as well, in their order."""
        self._send(self._link.connection.request(message))
        deadline = monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                event = self._link.receive(max(0.0, deadline - monotonic()))
            except TimeoutError:
                text = f"no answer to {message.command.name} within {_TIMEOUT_SECONDS:.0f} s"
                raise SessionEnded(text, bad=True) from None
            except RemoteProtocolError as error:
                raise SessionEnded(str(error), bad=True) from None
            except OSError as error:
                raise SessionEnded(f"connection lost: {error.strerror}") from None
            if event is None:
                raise SessionEnded("closed by the client")
            if isinstance(event, Reply):
                with event:
                    return event.message
            self._waiting.append(event)
            if len(self._waiting) > _MOST_WAITING:
                raise SessionEnded(
                    f"{_MOST_WAITING} requests and no answer to {message.command.name}", bad=True
                )

    # -- the end -----------------------------------------------------------------------------------

    def close(self, reason: str, *, bad: bool) -> None:
        """Let go of everything the client gave."""
        if bad:
            self._broke(RuleBroken(Rule.PROTOCOL, errno.EPROTO, reason), None, None)
        windows = list(self.table.windows)
        for request in self._waiting:
            request.close()
        self._waiting.clear()
        self.table.close()
        self._link.close()
        self._record.disconnected(self.name, reason, windows)
