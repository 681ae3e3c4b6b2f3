# SPDX-License-Identifier: Apache-2.0
"""
One vfio-user connection without its socket: bytes and descriptors in, events out.

Messages in, bytes out.

Theory of operation. Both sides send commands on the one stream, and each answers the other's, so a
connection remembers two things: the requests that it sent and that are not answered (by their id,
which is ours to choose), and the requests that it received and has not answered (by object: the
peer's ids are the peer's business, and may repeat). The first message is the client's VERSION, the
second the server's answer; nothing else may be sent before. Their announcements are the limits of
all that follows.

Its feeder drains it: after each :meth:`Connection.receive`, :meth:`Connection.next_event` until
``NEED_DATA``. Then it never holds more than one message, whose size is limited, and the descriptors
of one message.

A command that makes no sense, but whose end is known, is an ``InvalidRequest``: its answer is
EINVAL, and the connection goes on. More payload or descriptors than belong to a message are left
out, and a remark of the event says so. Only these are a ``RemoteProtocolError``, raised once, by
``next_event``: a header whose size cannot be, a stream that ends within a message, and, for a
client, an answer that it cannot believe. The connection is dead then: it has closed the descriptors
that it held, and every call is a ``LocalProtocolError``. Events that were handed out before are
whole, and keep their descriptors.
"""

from __future__ import annotations

import errno as errnos
import struct
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from typing import NoReturn

from ramblock.dma.vfio_user.capabilities import Capabilities
from ramblock.dma.vfio_user.descriptors import CloseDescriptor, Descriptors
from ramblock.dma.vfio_user.events import (
    CLOSED,
    NEED_DATA,
    Event,
    Oddity,
    Outgoing,
    Remark,
    Reply,
    Request,
)
from ramblock.dma.vfio_user.header import Header
from ramblock.dma.vfio_user.inbox import Inbox
from ramblock.dma.vfio_user.layout import MalformedError, Message
from ramblock.dma.vfio_user.numbers import (
    DEFAULT_MAX_DATA_XFER_SIZE,
    ERRNO_LIMIT,
    FROM_SERVER,
    HEADER_SIZE,
    KERNEL_MAX_FDS,
    MAX_VERSION_DATA,
    Command,
    HeaderFlags,
    command_name,
)
from ramblock.dma.vfio_user.replies import (
    REPLIES,
    DmaUnmapReply,
    ErrorReply,
    InvalidReply,
    UnknownReply,
    VersionReply,
    check_answer,
)
from ramblock.dma.vfio_user.requests import (
    REQUESTS,
    DmaUnmap,
    InvalidRequest,
    UnknownRequest,
    Version,
)
from ramblock.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Connection", "Role"]

# A message's bytes beside its data: the header, and the largest fixed part.
_OVERHEAD = 64
_IDS = 1 << 16

#: Our limits where nothing else is said. QEMU and libvfio-user send up to 8 and 16 descriptors.
OWN_CAPABILITIES = Capabilities(max_msg_fds=16, max_data_xfer_size=DEFAULT_MAX_DATA_XFER_SIZE)


class Role(Enum):
    """Which side of a connection this is."""

    CLIENT = "client"
    """The VMM: has the memory, sends VERSION first."""
    SERVER = "server"
    """The device."""


class _Stage(Enum):
    NEW = "before VERSION"
    NEGOTIATING = "before the answer to VERSION"
    OPEN = "open"
    CLOSED = "closed"


class Connection:
    """
    One side of a connection. Not for several threads at once.

    :param role: Which side.
    :param close_descriptor: Closes a descriptor that nobody took: ``os.close``.
    :param capabilities: This side's announcement, and so its limits.
    :param peer: The peer's, where it is known already: this is the twin of a connection that is
        negotiated, for the server's commands.
    """

    def __init__(
        self,
        role: Role,
        close_descriptor: CloseDescriptor,
        capabilities: Capabilities = OWN_CAPABILITIES,
        peer: Capabilities | None = None,
    ) -> None:
        self.role = role
        #: This side's announcement.
        self.own = capabilities
        #: The peer's announcement; before it, the defaults of one that says nothing.
        self.peer = peer or Capabilities()
        self._close_descriptor = close_descriptor
        self._inbox = Inbox(close_descriptor)
        self._stage = _Stage.NEW if peer is None else _Stage.OPEN
        self._eof = False
        self._violation: str | None = None
        self._next_id = 0
        self._sent: dict[int, Message] = {}
        self._unanswered: set[Request] = set()

    # -- state -------------------------------------------------------------------------------------

    @property
    def negotiated(self) -> bool:
        """Whether the version is agreed upon and any message may be sent."""
        return self._stage is _Stage.OPEN

    @property
    def closed(self) -> bool:
        """Whether it is over: closed, or dead after an error."""
        return self._stage is _Stage.CLOSED

    @property
    def outstanding(self) -> int:
        """How many requests of ours wait for their answer."""
        return len(self._sent)

    @property
    def max_message_size(self) -> int:
        """The largest message that is accepted, in bytes."""
        if self._stage is not _Stage.OPEN:
            return MAX_VERSION_DATA + _OVERHEAD
        return max(self.own.max_data_xfer_size, MAX_VERSION_DATA) + _OVERHEAD

    @property
    def received(self) -> int:
        """How many bytes the messages have that were received as a whole."""
        return self._inbox.offset

    @property
    def incomplete(self) -> int | None:
        """Where in the stream a message begins that has not arrived as a whole; None: nowhere."""
        waiting = len(self._inbox) or self._inbox.descriptors
        return self._inbox.offset if waiting else None

    @property
    def wanted(self) -> int:
        """
        How many bytes are missing from the header of the next message, or from the message.

        At least 1 when drained.
        """
        header = self._inbox.header()
        return (HEADER_SIZE if header is None else header.size) - len(self._inbox)

    def close(self) -> None:
        """
        End it, and close the descriptors that no event has claimed.

        Nothing happens the second time.
        """
        self._stage = _Stage.CLOSED
        self._inbox.close()
        self._sent.clear()
        self._unanswered.clear()

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """
        Take in bytes that arrived.

        :param data: A chunk of the stream, of any size.
        :param fds: The descriptors that came with it; they are the connection's from now on in any
            case.
        :raises LocalProtocolError: The connection is over. *fds* are closed.
        """
        if self.closed:
            Descriptors(fds, self._close_descriptor).close()
            self._check_open("receive")
        self._inbox.add(data, fds)
        if self._inbox.descriptors > KERNEL_MAX_FDS:
            self.reject(f"{self._inbox.descriptors} descriptors in one message")

    def receive_eof(self) -> None:
        """Take note that the peer has closed its side."""
        self._eof = True

    def reject(self, text: str) -> None:
        """Let the next :meth:`next_event` raise a ``RemoteProtocolError``, *text*, for the edge."""
        if self._violation is None:
            self._violation = text

    def next_event(self) -> Event:
        """
        Return the next event.

        :return: A :class:`Request` or :class:`Reply`, which own their descriptors; ``NEED_DATA``;
            or ``CLOSED``, again and again, after the peer has closed its side between two messages.
        :raises RemoteProtocolError: The peer broke the protocol. The connection is dead; its
            descriptors are closed.
        :raises LocalProtocolError: It is over already.
        """
        self._check_open("next_event")
        header, offset = self._inbox.header(), self._inbox.offset
        if self._violation is not None:
            self._die(self._violation, header, offset)
        if header is not None:
            limit = self.max_message_size
            if not HEADER_SIZE <= header.size <= limit:
                text = f"size {header.size:#x}, expected {HEADER_SIZE:#x} to {limit:#x}"
                self._die(text, header, offset)
            if len(self._inbox) >= header.size:
                try:
                    return self._take(header)
                except MalformedError as error:
                    self._die(str(error), header, offset)
        if not self._eof:
            return NEED_DATA
        if len(self._inbox) or self._inbox.descriptors:
            text = f"the stream ends {self.wanted:#x} bytes before the end of a message"
            self._die(text, header, offset)
        return CLOSED

    def _take(self, header: Header) -> Request | Reply:
        payload, numbers = self._inbox.take(header.size)
        fds = Descriptors(numbers, self._close_descriptor)
        try:
            request = self._sent.get(header.message_id) if header.is_reply else None
            if self.role is Role.CLIENT:
                self._check_for_client(header, request)
            if request is None or request.command != header.command:
                return self._command(header, payload, fds)
            return self._answer(header, payload, fds, request)
        except BaseException:
            fds.close()
            raise

    def _check_for_client(self, header: Header, request: Message | None) -> None:
        """
        Check an answer's origin: a server whose answers are about nothing cannot be believed.

        Before the version is agreed upon, its commands cannot be understood.
        """
        header.check_kind()
        if header.is_reply:
            if request is None:
                raise MalformedError("a reply to nothing")
            if request.command != header.command:
                raise MalformedError(f"a reply to {command_name(request.command)}")
        elif self._stage is not _Stage.OPEN:
            raise MalformedError(f"a command {self._stage.value}")

    # -- commands

    def _command(self, header: Header, payload: bytes, fds: Descriptors) -> Request:
        remarks = _remarks(header)
        message: Message
        try:
            self._expect(header)
            kind = REQUESTS.get(header.command)
            message = (
                UnknownRequest(header.command, payload) if kind is None else kind.unpack(payload)
            )
            _check_amount(message, self.own)
        except MalformedError as error:
            message = InvalidRequest(header.command, str(error))
            fds.close()
        else:
            remarks += self._leave_out(message, payload, fds)
        if isinstance(message, Version):
            self.peer = message.capabilities
            self._stage = _Stage.NEGOTIATING
        # An error reply to nothing gets no answer: two such sides would go on for ever.
        no_reply = header.no_reply or (header.is_reply and header.is_error)
        request = Request(header.message_id, message, fds, no_reply, tuple(remarks))
        if not request.no_reply:
            self._unanswered.add(request)
        return request

    def _expect(self, header: Header) -> None:
        """Check that such a command may come now."""
        header.check_kind()
        if header.is_reply:
            raise MalformedError("a reply to nothing")
        from_server = header.command in FROM_SERVER
        if header.command in REQUESTS and from_server is not (self.role is Role.CLIENT):
            raise MalformedError(f"not a command for the {self.role.value}")
        is_first = self.role is Role.SERVER and self._stage is _Stage.NEW
        if is_first is not (header.command == Command.VERSION):
            raise MalformedError("the first message, and only that, is VERSION")
        if is_first and header.no_reply:
            raise MalformedError("VERSION wants no reply")
        if not is_first and self._stage is not _Stage.OPEN:
            raise MalformedError(f"a command {self._stage.value}")

    # -- answers

    def _answer(self, header: Header, payload: bytes, fds: Descriptors, request: Message) -> Reply:
        remarks = _remarks(header)
        message: Message | ErrorReply
        if header.is_error:
            # libvfio-user has a payload in it where a region access is refused
            # (lib/libvfio-user.c, handle_region_access() with do_reply()).
            if payload:
                remarks.append(Remark(Oddity.ERROR_WITH_PAYLOAD, f"{len(payload):#x} bytes"))
            number = header.errno
            if number >= ERRNO_LIMIT:
                remarks.append(Remark(Oddity.ERRNO, f"{number:#x}"))
                number = 0
            message = ErrorReply(header.command, number)
            remarks += _close_from(fds, 0)
        elif isinstance(request, DmaUnmap) and not payload:
            # libvfio-user, for a device without DMA (lib/libvfio-user.c, handle_request()).
            message = DmaUnmapReply(request.flags, request.address, request.size)
            remarks.append(Remark(Oddity.NO_PAYLOAD, "the range is the request's"))
            remarks += _close_from(fds, 0)
        else:
            try:
                message = self._read_answer(header.command, payload, fds, request)
            except MalformedError as error:
                if self.role is Role.CLIENT:
                    raise
                message = InvalidReply(header.command, errnos.EPROTO, str(error))
                fds.close()
            else:
                remarks += self._leave_out(message, payload, fds)
        del self._sent[header.message_id]
        return Reply(header.message_id, message, fds, request, tuple(remarks))

    def _read_answer(
        self, command: int, payload: bytes, fds: Descriptors, request: Message
    ) -> Message:
        kind = REPLIES.get(command)
        message = UnknownReply(command, payload) if kind is None else kind.unpack(payload)
        check_answer(request, message)
        if isinstance(message, VersionReply):
            # Those behind our limit are left out.
            _check_twin(message.capabilities, self.own, min(len(fds), self.own.max_msg_fds))
            self.peer = message.capabilities
            self._stage = _Stage.OPEN
        return message

    def _leave_out(self, message: Message, payload: bytes, fds: Descriptors) -> list[Remark]:
        """Close descriptors that do not belong to a message; tell of them, and of bytes."""
        limit = self.own.max_msg_fds
        if message.max_fds is not None:
            limit = min(limit, message.max_fds)
        remarks = _close_from(fds, limit)
        expected = message.fixed_size
        if expected is not None and len(payload) > expected:
            text = f"{len(payload):#x} bytes, expected {expected:#x}"
            remarks.append(Remark(Oddity.LONG_PAYLOAD, text))
        return remarks

    # -- sending -----------------------------------------------------------------------------------

    def request(
        self, message: Message, fds: Iterable[int] = (), *, no_reply: bool = False
    ) -> Outgoing:
        """
        Make a request. The returned messages have to be sent in their order.

        :param fds: Descriptors that go along; they stay the caller's.
        :param no_reply: Ask for no answer; there will be no :class:`Reply` then.
        :raises LocalProtocolError: It may not be sent, now or at all, or more than the peer takes;
            nothing has changed.
        """
        numbers = tuple(fds)
        command = message.command
        self._check_open("request")
        message_id = self._new_id()
        flags = HeaderFlags.NO_REPLY if no_reply else 0
        try:
            self._may_send(message, numbers, no_reply=no_reply)
            outgoing = _outgoing(message_id, command, flags, 0, message.pack(), numbers)
        except (MalformedError, struct.error) as error:
            raise LocalProtocolError(f"{command_name(command)}: {error}", command=command) from None
        if command == Command.VERSION:
            self._stage = _Stage.NEGOTIATING
        if not no_reply:
            self._sent[message_id] = message
        self._next_id = (message_id + 1) % _IDS
        return outgoing

    def _may_send(self, message: Message, fds: tuple[int, ...], *, no_reply: bool) -> None:
        if REQUESTS.get(message.command, UnknownRequest) is not type(message):
            raise MalformedError("not a request")
        is_version = message.command == Command.VERSION
        if is_version and (self.role is Role.SERVER or self._stage is not _Stage.NEW or no_reply):
            raise MalformedError("VERSION is the first message of a client, and wants an answer")
        if not is_version and self._stage is not _Stage.OPEN:
            raise MalformedError(f"a command {self._stage.value}")
        from_server = message.command in FROM_SERVER
        if message.command in REQUESTS and from_server is not (self.role is Role.SERVER):
            raise MalformedError(f"not a command of the {self.role.value}")
        if isinstance(message, Version) and message.capabilities != self.own:
            raise MalformedError("other capabilities than those of this connection")
        _check_fds(message, len(fds), self.peer)
        # The answer to a read is a message for us.
        _check_amount(message, self.peer)
        _check_amount(message, self.own)

    def _new_id(self) -> int:
        if len(self._sent) == _IDS:
            raise LocalProtocolError(f"{_IDS} requests wait for their answer already")
        message_id = self._next_id
        while message_id in self._sent:
            message_id = (message_id + 1) % _IDS
        return message_id

    def reply(self, request: Request, message: Message, fds: Iterable[int] = ()) -> Outgoing:
        """
        Answer *request*. The returned message has to be sent.

        :param fds: Descriptors that go along; they stay the caller's.
        :raises LocalProtocolError: *request* wants no answer or has one already, *message* does not
            answer it, or is more than the peer takes. Nothing has changed; *request* can still be
            answered.
        """
        numbers = tuple(fds)
        self._check_unanswered(request)
        try:
            self._may_answer(request.message, message, numbers)
            payload = message.pack()
        except (MalformedError, struct.error) as error:
            raise LocalProtocolError(
                f"reply to {command_name(request.message.command)}: {error}",
                command=request.message.command,
                message_id=request.message_id,
            ) from None
        if isinstance(message, VersionReply):
            self._stage = _Stage.OPEN
        self._unanswered.remove(request)
        command = request.message.command
        return _outgoing(request.message_id, command, HeaderFlags.REPLY, 0, payload, numbers)

    def _may_answer(self, request: Message, message: Message, fds: tuple[int, ...]) -> None:
        if (
            isinstance(request, InvalidRequest)
            or REPLIES.get(request.command, UnknownReply) is not type(message)
            or message.command != request.command
        ):
            raise MalformedError(f"{type(message).__name__} is none")
        if isinstance(message, VersionReply):
            found = message.capabilities
            _check_twin(found, self.peer, len(fds))
            if replace(found, twin_socket=self.own.twin_socket, twin_fd_index=None) != self.own:
                raise MalformedError("other capabilities than those of this connection")
        _check_fds(message, len(fds), self.peer)
        check_answer(request, message)

    def error(self, request: Request, errno: int) -> Outgoing:
        """
        Answer *request* with an error.

        Before the version is agreed upon the connection is over then, and the returned message is
        its last.

        :param errno: Positive.
        :raises LocalProtocolError: *request* wants no answer or has one already. Nothing has
            changed.
        """
        self._check_unanswered(request)
        command = request.message.command
        if not 0 < errno < ERRNO_LIMIT:
            raise LocalProtocolError(f"{errno} is no errno", command=command)
        self._unanswered.remove(request)
        if self._stage is not _Stage.OPEN:
            self.close()
        flags = HeaderFlags.REPLY | HeaderFlags.ERROR
        return _outgoing(request.message_id, command, flags, errno, b"", ())

    def _check_unanswered(self, request: Request) -> None:
        self._check_open("reply")
        if request not in self._unanswered:
            raise LocalProtocolError(
                "the request wants no reply" if request.no_reply else "the request was answered",
                command=request.message.command,
                message_id=request.message_id,
            )

    # -- the end -----------------------------------------------------------------------------------

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise LocalProtocolError(f"{what}: {self._violation or 'the connection is closed'}")

    def _die(self, text: str, header: Header | None, offset: int) -> NoReturn:
        where = f"at byte {offset:#x}"
        if header is not None:
            where = f"{command_name(header.command)}, id {header.message_id:#x}, {where}"
        self._violation = f"{where}: {text}"
        self.close()
        raise RemoteProtocolError(
            self._violation,
            command=None if header is None else header.command,
            message_id=None if header is None else header.message_id,
            offset=offset,
        )


def _check_fds(message: Message, count: int, receiver: Capabilities) -> None:
    limit = receiver.max_msg_fds
    if message.max_fds is not None:
        limit = min(limit, message.max_fds)
    if count > limit:
        raise MalformedError(f"{count} descriptors, limit {limit}")


def _check_twin(answer: Capabilities, asked: Capabilities, fds: int) -> None:
    """Check the server's answer about a socket of its own: offered, and there."""
    if not answer.twin_socket:
        return
    if not asked.twin_socket:
        raise MalformedError("a twin_socket that was not asked for")
    index = answer.twin_fd_index
    if index is None or index >= fds:
        raise MalformedError(f"twin_socket is descriptor {index}, and {fds} are there")


def _remarks(header: Header) -> list[Remark]:
    odd = header.odd_flags()
    return [] if odd is None else [Remark(Oddity.FLAGS, odd)]


def _close_from(fds: Descriptors, limit: int) -> list[Remark]:
    """Close the descriptors behind the first *limit*."""
    count = fds.close_from(limit)
    return [Remark(Oddity.DESCRIPTORS, f"{count} too many")] if count else []


def _check_amount(message: Message, receiver: Capabilities) -> None:
    limit = receiver.max_data_xfer_size
    if message.amount > limit:
        raise MalformedError(f"{message.amount:#x} bytes of data, limit {limit:#x}")


def _outgoing(
    message_id: int, command: int, flags: int, errno: int, payload: bytes, fds: tuple[int, ...]
) -> Outgoing:
    header = Header(message_id, command, HEADER_SIZE + len(payload), flags, errno)
    return Outgoing(message_id, header.pack() + payload, fds)
