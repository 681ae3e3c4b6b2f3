# SPDX-License-Identifier: Apache-2.0
"""One client of a probe, from VERSION to its end: its requests are answered and checked."""

from __future__ import annotations

import errno
import socket
from collections import deque
from dataclasses import replace
from enum import Enum
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
    InvalidReply,
    InvalidRequest,
    Message,
    Version,
    VersionReply,
)
from ramblock.dma.vfio_user.numbers import DmaFlags, DmaUnmapFlags, command_name
from ramblock.errors import LocalProtocolError, RemoteProtocolError, describe_range
from ramblock.probe.device import ProbeDevice
from ramblock.probe.engine import DmaRefusedError
from ramblock.probe.record import Record, Violation
from ramblock.probe.windows import Note, Rule, RuleBroken, UnmapRule, Window, WindowTable

__all__ = ["CAPABILITIES", "Session", "SessionEnded"]

#: The probe's announcement. The limit on windows is type1's, which VMMs know.
CAPABILITIES = Capabilities(
    max_msg_fds=8, max_dma_maps=65535, write_multiple=True, twin_socket=True
)

# Plain numbers: the complement of an IntFlag has no bits but those that have names.
_MAP_FLAGS = int(DmaFlags.READ | DmaFlags.WRITE | DmaFlags.MMAP | DmaFlags.FILE_IO)
_FILE_FLAGS = int(DmaFlags.MMAP | DmaFlags.FILE_IO)
_UNMAP_FLAGS = int(DmaUnmapFlags.GET_DIRTY_BITMAP | DmaUnmapFlags.ALL)
# A client that is alive answers within this, and sends its messages whole; an emulated one on a
# busy machine as well.
_TIMEOUT_SECONDS = 10.0
# Requests that may come in while the client owes us an answer, and their bytes.
_MOST_WAITING = 1024
_MOST_WAITING_BYTES = 1 << 24
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
        self._device = ProbeDevice(self, self._note)
        # With their bytes.
        self._waiting: deque[tuple[Request, int]] = deque()
        self._waiting_bytes = 0
        # For our commands and their answers, if the client takes it.
        self._twin: Link | None = None
        # Where an incomplete message begins (None: the first has not begun), and until when it has
        # to be there.
        self._incomplete: tuple[int | None, float] | None = (None, monotonic() + _TIMEOUT_SECONDS)
        # When the client's answers to the present access have to be there.
        self._access_ends = 0.0

    def fileno(self) -> int:
        """Tell the socket, for polling."""
        return self._link.fileno()

    @property
    def bus_master(self) -> bool:
        """Whether the device's driver allows DMA."""
        return self._device.bus_master

    @property
    def deadline(self) -> float | None:
        """When :meth:`serve` has to be called although nothing may have arrived; monotonic."""
        return None if self._incomplete is None else self._incomplete[1]

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
            request = self._next_waiting() or self._next()
            if request is None:
                self._check_deadline()
                return False
            with request:
                self._answer(request)
        return True

    def _check_deadline(self) -> None:
        """End a client that keeps others out with half a message, or none at all."""
        connection = self._link.connection
        begins, now = connection.incomplete, monotonic()
        if begins is None and connection.negotiated:
            self._incomplete = None
        elif self._incomplete is None or self._incomplete[0] != begins:
            self._incomplete = begins, now + _TIMEOUT_SECONDS
        elif now >= self._incomplete[1]:
            what = "no VERSION" if begins is None else "the rest of a message did not come"
            raise SessionEnded(f"{what} within {_TIMEOUT_SECONDS:.0f} s", bad=True)

    def _next_waiting(self) -> Request | None:
        if not self._waiting:
            return None
        request, size = self._waiting.popleft()
        self._waiting_bytes -= size
        return request

    def _next(self) -> Request | None:
        try:
            event = self._link.event()
        except RemoteProtocolError as error:
            raise SessionEnded(str(error), bad=True) from None
        except OSError as error:
            raise SessionEnded(f"connection lost: {error.strerror}") from None
        if event is CLOSED:
            raise SessionEnded("closed by the client")
        if event is NEED_DATA:
            return None
        # Each question is answered before the next event: an answer to nothing is a Request.
        assert isinstance(event, Request)
        return event

    def _answer(self, request: Request) -> None:
        connection = self._link.connection
        for remark in request.remarks:
            self._note(remark.oddity, f"{command_name(request.message.command)}, {remark.text}")
        answer = self._carry_out(request)
        if isinstance(answer, VersionReply):
            self._agree(request, answer)
        elif not request.no_reply:
            if isinstance(answer, int):
                outgoing = connection.error(request, answer)
            else:
                try:
                    outgoing = connection.reply(request, answer)
                except LocalProtocolError:
                    # More of its own request than the client takes.
                    outgoing = connection.error(request, errno.EINVAL)
            self._send(self._link, outgoing)
        if not connection.negotiated:
            raise SessionEnded("no version was agreed upon")

    def _agree(self, request: Request, answer: VersionReply) -> None:
        """Answer VERSION, with a socket for our commands where the client takes one."""
        peer = self._link.connection.peer
        self._record.emit("connect", target=self.name, max_msg_fds=peer.max_msg_fds)
        if not (peer.twin_socket and peer.max_msg_fds):
            self._send(self._link, self._link.connection.reply(request, answer))
            return
        ours, theirs = socket.socketpair()
        with theirs:
            self._twin = self._link.twin(ours)
            capabilities = replace(CAPABILITIES, twin_fd_index=0)
            answer = replace(answer, capabilities=capabilities)
            outgoing = self._link.connection.reply(request, answer, (theirs.fileno(),))
            self._send(self._link, outgoing)

    def _send(self, link: Link, outgoing: Outgoing) -> None:
        try:
            link.send(outgoing, _TIMEOUT_SECONDS)
        except TimeoutError:
            raise SessionEnded("the client does not read", bad=True) from None
        except OSError as error:
            raise SessionEnded(f"connection lost: {error.strerror}") from None

    def _carry_out(self, request: Request) -> Message | int:
        message = request.message
        match message:
            case DmaMap():
                return self._map(message, request)
            case DmaUnmap():
                return self._unmap(message)
        try:
            return self._carry_out_elsewhere(message, len(request.fds))
        except RuleBroken as error:
            return self._broke(error, None, None)

    def _carry_out_elsewhere(self, message: Message, fds: int) -> Message | int:
        match message:
            case Version():
                if message.major:
                    text = f"VERSION {message.major}.{message.minor}, and 0.0 is spoken here"
                    raise RuleBroken(Rule.MESSAGE, errno.EINVAL, text)
                return VersionReply(0, 0, replace(CAPABILITIES, twin_socket=False))
            case InvalidRequest():
                text = f"{command_name(message.command)}: {message.reason}"
                raise RuleBroken(Rule.MESSAGE, errno.EINVAL, text)
        return self._device.carry_out(message, fds)

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
            raise RuleBroken(Rule.UNKNOWN, errno.EINVAL, f"flags {flags:#x} of a map")
        ways = flags & _FILE_FLAGS
        if ways == _FILE_FLAGS or (ways and not len(request.fds)):
            # libvfio-user: lib/libvfio-user.c, handle_dma_map().
            text = f"flags {flags:#x} of a map with {len(request.fds)} descriptors"
            raise RuleBroken(Rule.CONTRADICTION, errno.EINVAL, text)
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
        if flags == DmaUnmapFlags.GET_DIRTY_BITMAP:
            return errno.ENOTSUP
        try:
            if flags & ~_UNMAP_FLAGS:
                raise RuleBroken(Rule.UNKNOWN, errno.EINVAL, f"flags {flags:#x} of an unmap")
            removed = self._remove_all(message) if flags else self.table.remove(address, size)
        except RuleBroken as error:
            number = self._broke(error, address, size)
            for window in self.table.windows:
                if window.stale:
                    self._record.became_stale(self.name, window)
            return number
        if not flags and [(one.address, one.size) for one in removed] != [(address, size)]:
            text = f"unmap of {describe_range(address, size)}, which are {len(removed)} windows"
            self._note(Note.INEXACT_UNMAP, text)
        self._record.unmapped(self.name, address, size, removed)
        # "The server responds with the original DMA entry in the request" (the specification,
        # VFIO_USER_DMA_UNMAP), so for all of them with size 0.
        return DmaUnmapReply(flags, address, size)

    def _remove_all(self, message: DmaUnmap) -> list[Window]:
        if message.flags != DmaUnmapFlags.ALL:
            # libvfio-user: lib/libvfio-user.c, is_valid_unmap().
            text = f"flags {message.flags:#x} of an unmap"
            raise RuleBroken(Rule.CONTRADICTION, errno.EINVAL, text)
        if message.address or message.size:
            text = "an unmap of everything names a range as well"
            raise RuleBroken(Rule.EMPTY, errno.EINVAL, text)
        return self.table.remove_all()

    def _note(self, kind: Enum, text: str) -> None:
        self._record.note(self.name, kind, text)

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
        # One deadline for all questions of an access: a client may take a byte in each.
        self._access_ends = monotonic() + _TIMEOUT_SECONDS
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
        link = self._twin or self._link
        self._send(link, link.connection.request(message))
        while True:
            begins = link.connection.received
            try:
                event = link.receive(max(0.0, self._access_ends - monotonic()))
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
                    return self._answer_of(event)
            if link is self._twin:
                with event:
                    self._refuse_on_twin(link, event)
            else:
                self._let_wait(event, link.connection.received - begins, message)

    def _answer_of(self, reply: Reply) -> Message | ErrorReply:
        command = command_name(reply.request.command)
        for remark in reply.remarks:
            self._note(remark.oddity, f"answer to {command}, {remark.text}")
        if isinstance(reply.message, InvalidReply):
            text = f"answer to {command}: {reply.message.reason}"
            self._broke(RuleBroken(Rule.MESSAGE, errno.EPROTO, text), None, None)
        return reply.message

    def _refuse_on_twin(self, twin: Link, request: Request) -> None:
        text = f"{command_name(request.message.command)} on the socket for the server's commands"
        number = self._broke(RuleBroken(Rule.MESSAGE, errno.EINVAL, text), None, None)
        if not request.no_reply:
            self._send(twin, twin.connection.error(request, number))

    def _let_wait(self, request: Request, size: int, asked: Message) -> None:
        self._waiting.append((request, size))
        self._waiting_bytes += size
        if len(self._waiting) > _MOST_WAITING or self._waiting_bytes > _MOST_WAITING_BYTES:
            raise SessionEnded(
                f"{len(self._waiting)} requests with {self._waiting_bytes} bytes,"
                f" and no answer to {asked.command.name}",
                bad=True,
            )

    # -- the end -----------------------------------------------------------------------------------

    def close(self, reason: str, *, bad: bool) -> None:
        """Let go of everything the client gave."""
        windows = list(self.table.windows)
        try:
            if bad:
                self._broke(RuleBroken(Rule.PROTOCOL, errno.EPROTO, reason), None, None)
        finally:
            for request, _ in self._waiting:
                request.close()
            self._waiting.clear()
            self.table.close()
            if self._twin is not None:
                self._twin.close()
            self._link.close()
            self._record.disconnected(self.name, reason, windows)
