"""
The protocol without a socket: two connections that are fed each other's bytes, and one that is fed
by a hostile peer.
"""

import errno
import itertools
import json
import re
import struct
from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramblock.dma.vfio_user import (
    CLOSED,
    NEED_DATA,
    OWN_CAPABILITIES,
    Capabilities,
    Connection,
    Outgoing,
    Reply,
    Request,
    Role,
)
from ramblock.dma.vfio_user.events import Oddity
from ramblock.dma.vfio_user.messages import (
    DeviceInfoReply,
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    DmaWriteReply,
    ErrorReply,
    GetDeviceInfo,
    GetRegionInfo,
    InvalidReply,
    InvalidRequest,
    Message,
    RegionInfoReply,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
    Reset,
    ResetReply,
    SetIrqs,
    SetIrqsReply,
    UnknownReply,
    UnknownRequest,
    Version,
    VersionReply,
)
from ramblock.errors import LocalProtocolError, ProtocolError, RemoteProtocolError


class Peer:
    """A connection, and the descriptors that it has closed."""

    def __init__(self, role: Role, capabilities: Capabilities = OWN_CAPABILITIES) -> None:
        self.closed: list[int] = []
        self.connection = Connection(role, self.closed.append, capabilities)

    def feed(self, outgoing: Outgoing) -> None:
        self.connection.receive(outgoing.data, outgoing.fds)

    def request(self) -> Request:
        event = self.connection.next_event()
        assert isinstance(event, Request)
        return event

    def reply(self) -> Reply:
        event = self.connection.next_event()
        assert isinstance(event, Reply)
        return event

    def makes_no_sense(self, match: str) -> Request:
        """It finds a message that is to be answered by EINVAL, and goes on."""
        request = self.request()
        assert isinstance(request.message, InvalidRequest)
        assert re.search(match, request.message.reason), request.message.reason
        assert not len(request.fds)
        assert not self.connection.closed
        return request

    def fails(self, match: str) -> RemoteProtocolError:
        """It finds a mistake of the peer's, and is dead afterwards."""
        with pytest.raises(RemoteProtocolError, match=match) as caught:
            self.connection.next_event()
        assert self.connection.closed
        for call in (
            self.connection.next_event,
            lambda: self.connection.receive(b"", (77,)),
            lambda: self.connection.request(Reset()),
        ):
            with pytest.raises(LocalProtocolError, match=match):
                call()
        assert 77 in self.closed
        return caught.value


class Pair:
    def __init__(
        self,
        client: Capabilities = OWN_CAPABILITIES,
        server: Capabilities = OWN_CAPABILITIES,
    ) -> None:
        self.client = Peer(Role.CLIENT, client)
        self.server = Peer(Role.SERVER, server)
        version = Version(0, 0, client)
        self.server.feed(self.client.connection.request(version))
        request = self.server.request()
        assert request.message == version
        answer = VersionReply(0, 0, server)
        self.client.feed(self.server.connection.reply(request, answer))
        assert self.client.reply().message == answer
        assert self.client.connection.negotiated
        assert self.server.connection.negotiated
        assert self.client.connection.peer == server
        assert self.server.connection.peer == client

    def of(self, role: Role) -> tuple[Peer, Peer]:
        """That side, and the other."""
        both = (self.client, self.server)
        return both if role is Role.CLIENT else both[::-1]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def message(
    command: int,
    payload: bytes = b"",
    *,
    message_id: int = 7,
    flags: int = 0,
    error: int = 0,
    size: int | None = None,
) -> bytes:
    """One as a peer may send it that keeps no rules."""
    size = 16 + len(payload) if size is None else size
    return struct.pack("=HHIII", message_id, command, size, flags, error) + payload


# -- what may be said ------------------------------------------------------------------------------

CONVERSATION: list[tuple[Role, Message, Sequence[int], Message, Sequence[int]]] = [
    (Role.CLIENT, DmaMap(3, 0, 0x1000, 0x1000), (10,), DmaMapReply(), ()),
    (Role.CLIENT, DmaMap(1, 0, 0x2000, 0x1000), (), DmaMapReply(), ()),
    (Role.CLIENT, DmaUnmap(0, 0x1000, 0x1000), (), DmaUnmapReply(0, 0x1000, 0x1000), ()),
    (Role.CLIENT, GetDeviceInfo(), (), DeviceInfoReply(16, 2, 9, 5), ()),
    (Role.CLIENT, GetRegionInfo(64, 0), (), RegionInfoReply(32, 4, 0, 0, 4096, 0), (20,)),
    (Role.CLIENT, SetIrqs(36, 2, 0, 3), (30, 31, 32), SetIrqsReply(), ()),
    (Role.CLIENT, RegionRead(0, 8, 4), (), RegionReadReply(0, 8, b"abcd"), ()),
    (Role.CLIENT, RegionWrite(0, 8, b"abcd"), (), RegionWriteReply(0, 8, 4), ()),
    (Role.CLIENT, Reset(), (), ResetReply(), ()),
    (Role.CLIENT, UnknownRequest(16, b"feature"), (40,), UnknownReply(16, b"!"), (41,)),
    (Role.SERVER, DmaRead(0x2000, 3), (), DmaReadReply(0x2000, b"abc"), ()),
    (Role.SERVER, DmaWrite(0x2000, b"abc"), (), DmaWriteReply(0x2000, 3), ()),
    (Role.SERVER, UnknownRequest(999, b""), (), UnknownReply(999, b""), ()),
]


@pytest.mark.parametrize(
    ("role", "asked", "fds", "answer", "answer_fds"),
    CONVERSATION,
    ids=[f"{role.value}-{type(asked).__name__}" for role, asked, *_ in CONVERSATION],
)
def test_a_request_and_its_answer(
    pair: Pair,
    role: Role,
    asked: Message,
    fds: Sequence[int],
    answer: Message,
    answer_fds: Sequence[int],
) -> None:
    asking, answering = pair.of(role)
    outgoing = asking.connection.request(asked, fds)
    assert outgoing.fds == tuple(fds)
    assert asking.connection.outstanding == 1
    answering.feed(outgoing)
    request = answering.request()
    assert request.message == asked
    assert list(request.fds) == list(fds)
    asking.feed(answering.connection.reply(request, answer, answer_fds))
    reply = asking.reply()
    assert (reply.message_id, reply.message) == (outgoing.message_id, answer)
    assert reply.request is asked
    assert asking.connection.outstanding == 0
    for event, numbers, peer in ((request, fds, answering), (reply, answer_fds, asking)):
        with event:
            if numbers:
                assert event.fds.take() == numbers[0]
        event.close()
        assert sorted(peer.closed) == sorted(numbers[1:])
    assert asking.connection.next_event() is answering.connection.next_event() is NEED_DATA


@given(st.randoms(use_true_random=False), st.booleans())
def test_any_chunking(random: Random, together: bool) -> None:
    """
    The same events come out, however the stream is cut.

    And each descriptor with its own message.
    """
    pair = Pair()
    asked: list[Message] = []
    pieces: list[tuple[bytes, tuple[int, ...]]] = []
    numbers = itertools.count(100)
    for _, one, fds, _, _ in CONVERSATION[:10]:
        outgoing = pair.client.connection.request(one, [next(numbers) for _ in fds])
        asked.append(one)
        pieces += cut(random, outgoing)
    if together:
        # Without descriptors chunks may also reach from one message into the next.
        pieces = join(random, pieces)
    found: list[Request] = []
    connection = pair.server.connection
    for data, fds in pieces:
        connection.receive(data, fds)
        while isinstance(event := connection.next_event(), Request):
            found.append(event)
        assert event is NEED_DATA
        assert connection.wanted > 0
    assert [request.message for request in found] == asked
    counts = [len(fds) for _, _, fds, _, _ in CONVERSATION[:10]]
    assert [len(request.fds) for request in found] == counts
    everything = [number for request in found for number in request.fds]
    assert everything == list(range(100, 100 + sum(counts)))


def cut(random: Random, outgoing: Outgoing) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Pieces of one message; its descriptors come with the first."""
    data, fds = outgoing.data, outgoing.fds
    while data:
        size = random.randint(1, len(data))
        yield data[:size], fds
        data, fds = data[size:], ()


def join(
    random: Random, pieces: list[tuple[bytes, tuple[int, ...]]]
) -> list[tuple[bytes, tuple[int, ...]]]:
    joined: list[tuple[bytes, tuple[int, ...]]] = []
    for data, fds in pieces:
        if joined and not fds and random.random() < 0.5:
            joined[-1] = joined[-1][0] + data, joined[-1][1]
        else:
            joined.append((data, fds))
    return joined


def test_answers_may_come_in_any_order(pair: Pair) -> None:
    client, server = pair.client, pair.server
    ids = []
    for offset in range(3):
        outgoing = client.connection.request(RegionRead(0, offset, 1))
        ids.append(outgoing.message_id)
        server.feed(outgoing)
    requests = [server.request() for _ in range(3)]
    for request in reversed(requests):
        assert isinstance(request.message, RegionRead)
        data = bytes([request.message.offset])
        client.feed(server.connection.reply(request, RegionReadReply(0, data[0], data)))
    replies = [client.reply() for _ in range(3)]
    assert [reply.message_id for reply in replies] == ids[::-1]
    assert [reply.message for reply in replies] == [
        RegionReadReply(0, offset, bytes([offset])) for offset in (2, 1, 0)
    ]


def test_both_sides_ask_at_once_under_the_same_id(pair: Pair) -> None:
    client, server = pair.client.connection, pair.server.connection
    server.receive(server_data := client.request(Reset()).data)
    client.receive(client_data := server.request(DmaRead(0, 1)).data)
    assert len(server_data) > 0
    assert len(client_data) > 0
    to_server, to_client = pair.server.request(), pair.client.request()
    client.receive(server.reply(to_server, ResetReply()).data)
    server.receive(client.error(to_client, 14).data)
    assert pair.client.reply().message == ResetReply()
    assert pair.server.reply().message == ErrorReply(11, 14)


def test_ids_of_the_peer_may_repeat(pair: Pair) -> None:
    """They are the sender's business: the receiver answers both."""
    server = pair.server
    for _ in range(2):
        server.connection.receive(message(13, message_id=5))
    first, second = server.request(), server.request()
    for request in (second, first):
        outgoing = server.connection.reply(request, ResetReply())
        assert outgoing.message_id == 5


def test_a_command_that_wants_no_answer(pair: Pair) -> None:
    outgoing = pair.client.connection.request(RegionWrite(0, 0, b"x"), no_reply=True)
    assert pair.client.connection.outstanding == 0
    pair.server.feed(outgoing)
    request = pair.server.request()
    assert request.no_reply
    with pytest.raises(LocalProtocolError, match="wants no reply"):
        pair.server.connection.reply(request, RegionWriteReply(0, 0, 1))
    with pytest.raises(LocalProtocolError, match="wants no reply"):
        pair.server.connection.error(request, 22)


@pytest.mark.parametrize("number", [0, 2, 4095])
def test_an_error_reply(pair: Pair, number: int) -> None:
    client = pair.client
    outgoing = client.connection.request(Reset())
    client.connection.receive(message(13, message_id=outgoing.message_id, flags=0x21, error=number))
    assert client.reply().message == ErrorReply(13, number)


def test_the_errno_of_anything_else_means_nothing(pair: Pair) -> None:
    pair.server.connection.receive(message(13, error=0xFFFF_FFFF))
    assert pair.server.request().message == Reset()


def test_all_ids_in_use() -> None:
    client = Pair().client.connection
    ids = {client.request(Reset()).message_id for _ in range(1 << 16)}
    assert len(ids) == 1 << 16
    with pytest.raises(LocalProtocolError, match="65536 requests wait"):
        client.request(Reset())
    client.receive(message(13, message_id=1234, flags=1))
    assert isinstance(client.next_event(), Reply)
    assert client.request(Reset()).message_id == 1234


# -- negotiation -----------------------------------------------------------------------------------


def test_a_peer_without_version_data() -> None:
    server = Peer(Role.SERVER)
    server.connection.receive(message(1, struct.pack("=HH", 0, 1)))
    request = server.request()
    assert request.message == Version(0, 1, Capabilities())
    server.connection.reply(request, VersionReply(0, 0, OWN_CAPABILITIES))
    assert server.connection.peer.max_msg_fds == 1


def test_a_version_that_is_refused() -> None:
    client, server = Peer(Role.CLIENT), Peer(Role.SERVER)
    server.feed(client.connection.request(Version(3, 0, OWN_CAPABILITIES)))
    request = server.request()
    client.feed(server.connection.error(request, 22))
    assert server.connection.closed
    assert client.reply().message == ErrorReply(1, 22)
    assert not client.connection.negotiated
    with pytest.raises(LocalProtocolError, match="before the answer to VERSION"):
        client.connection.request(Reset())


VERSION = message(1, struct.pack("=HH", 0, 0))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (message(13), "only that, is VERSION"),
        (message(999), "only that, is VERSION"),
        (message(1, struct.pack("=HH", 0, 0) + b"{"), "NUL"),
        (message(1, b"\0\0\0"), "0x3 bytes"),
        (message(1, bytes(4), flags=1), "a reply to nothing"),
    ],
)
def test_first_messages_that_are_none(data: bytes, match: str) -> None:
    """
    EINVAL is the answer, and the last.

    As in libvfio-user: lib/tran.c, recv_version(); lib/tran_sock.c, tran_sock_attach().
    """
    server = Peer(Role.SERVER)
    server.connection.receive(data)
    request = server.makes_no_sense(match)
    server.connection.error(request, errno.EINVAL)
    assert server.connection.closed


def test_a_version_that_wants_no_reply() -> None:
    server = Peer(Role.SERVER)
    server.connection.receive(message(1, struct.pack("=HH", 0, 0), flags=0x10))
    assert server.makes_no_sense("VERSION wants no reply").no_reply
    assert not server.connection.negotiated


def test_a_first_message_that_is_too_large() -> None:
    server = Peer(Role.SERVER)
    server.connection.receive(VERSION[:4] + struct.pack("=I", 0x4041) + VERSION[8:])
    server.fails("size 0x4041")


def test_a_client_that_does_not_wait_for_the_answer_to_version() -> None:
    server = Peer(Role.SERVER)
    server.connection.receive(VERSION + message(13))
    server.request()
    server.makes_no_sense("before the answer to VERSION")


def test_a_second_version(pair: Pair) -> None:
    pair.server.connection.receive(VERSION)
    pair.server.makes_no_sense("only that, is VERSION")
    assert pair.server.connection.negotiated


def test_a_server_that_speaks_first() -> None:
    client = Peer(Role.CLIENT)
    client.connection.receive(message(11, struct.pack("=QQ", 0, 1)))
    client.fails("a command before VERSION")


@pytest.mark.parametrize("version", [(1, 0), (0, 1)])
def test_an_answer_with_a_version_that_was_not_proposed(version: tuple[int, int]) -> None:
    client = Peer(Role.CLIENT)
    outgoing = client.connection.request(Version(0, 0, OWN_CAPABILITIES))
    payload = struct.pack("=HH", *version)
    client.connection.receive(message(1, payload, message_id=outgoing.message_id, flags=1))
    client.fails("version|major")


def test_what_this_side_may_not_say_before_version() -> None:
    client, server = Peer(Role.CLIENT).connection, Peer(Role.SERVER).connection
    with pytest.raises(LocalProtocolError, match="before VERSION"):
        client.request(Reset())
    with pytest.raises(LocalProtocolError, match="wants an answer"):
        client.request(Version(0, 0, OWN_CAPABILITIES), no_reply=True)
    with pytest.raises(LocalProtocolError, match="other capabilities"):
        client.request(Version(0, 0, Capabilities()))
    for refused in (Version(0, 0, OWN_CAPABILITIES), DmaRead(0, 1)):
        with pytest.raises(LocalProtocolError):
            server.request(refused)
    client.request(Version(0, 0, OWN_CAPABILITIES))
    with pytest.raises(LocalProtocolError, match="first message"):
        client.request(Version(0, 0, OWN_CAPABILITIES))


@pytest.mark.parametrize(
    "answer",
    [
        VersionReply(1, 0, OWN_CAPABILITIES),
        VersionReply(0, 1, OWN_CAPABILITIES),
        VersionReply(0, 0, Capabilities()),
        ResetReply(),
    ],
)
def test_answers_to_version_that_may_not_be_given(answer: Message) -> None:
    server = Peer(Role.SERVER)
    server.connection.receive(VERSION)
    request = server.request()
    with pytest.raises(LocalProtocolError):
        server.connection.reply(request, answer)
    # It can still be answered.
    server.connection.reply(request, VersionReply(0, 0, OWN_CAPABILITIES))


# -- what a hostile peer sends ---------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (message(13, size=0), "size 0x0"),
        (message(13, size=15), "size 0xf"),
        (message(13, size=0xFFFF_FFFF), "size 0xffffffff"),
    ],
)
def test_headers_whose_message_has_no_end(pair: Pair, role: Role, data: bytes, match: str) -> None:
    victim, _ = pair.of(role)
    # The header is enough: nothing waits for a payload of four gigabytes.
    victim.connection.receive(data[:16], (50, 51))
    error = victim.fails(match)
    assert (error.command, error.message_id) == (13, 7)
    assert {50, 51} <= set(victim.closed)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (message(13, b"xyz", flags=2), "neither command nor reply"),
        (message(13, flags=0xF), "neither command nor reply"),
        (message(13, flags=1), "a reply to nothing"),
        (message(11, flags=1), "a reply to nothing"),
    ],
)
def test_messages_that_are_no_commands(pair: Pair, data: bytes, match: str) -> None:
    """
    A server goes on (libvfio-user: lib/libvfio-user.c, is_valid_header(), get_request()).

    A client does not: it could not believe that server's other answers.
    """
    server, client = pair.server, pair.client
    server.connection.receive(data, (50, 51))
    outgoing = server.connection.error(server.makes_no_sense(match), errno.EINVAL)
    assert outgoing.data == message(data[2], flags=0x21, error=22)
    assert {50, 51} <= set(server.closed)
    server.connection.receive(message(13))
    assert server.request().message == Reset()
    client.connection.receive(data, (50, 51))
    client.fails(match)
    assert {50, 51} <= set(client.closed)


def test_an_error_reply_to_nothing_is_not_answered(pair: Pair) -> None:
    """Or two sides that answer what makes no sense would go on for ever."""
    pair.server.connection.receive(message(13, flags=0x21, error=22))
    assert pair.server.makes_no_sense("a reply to nothing").no_reply


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0x40, "unknown flags 0x40"),
        (0x8000_0000, "unknown flags 0x80000000"),
        (0x20, "a command says that it failed"),
    ],
)
def test_header_flags_that_mean_nothing(pair: Pair, flags: int, text: str) -> None:
    """libvfio-user: lib/libvfio-user.c, is_valid_header() looks at the type alone."""
    pair.server.connection.receive(message(13, flags=flags))
    request = pair.server.request()
    assert request.message == Reset()
    assert request.remarks == ((Oddity.FLAGS, text),)
    outgoing = pair.client.connection.request(Reset())
    pair.client.connection.receive(
        message(13, message_id=outgoing.message_id, flags=flags & ~0x20 | 1)
    )
    assert pair.client.reply().message == ResetReply()


@pytest.mark.parametrize("role", Role)
def test_an_error_reply_with_a_payload(pair: Pair, role: Role) -> None:
    """
    It is an error reply, though the specification wants the header alone.

    libvfio-user has one for each refused region access (lib/libvfio-user.c, handle_region_access(),
    do_reply()).
    """
    side, _ = pair.of(role)
    asked = RegionRead(0, 0, 4) if role is Role.CLIENT else DmaRead(0, 4)
    outgoing = side.connection.request(asked)
    answer = message(asked.command, bytes(20), message_id=outgoing.message_id, flags=0x21, error=22)
    side.connection.receive(answer)
    reply = side.reply()
    assert reply.message == ErrorReply(asked.command, 22)
    assert reply.remarks == ((Oddity.ERROR_WITH_PAYLOAD, "0x14 bytes"),)


def test_an_error_reply_whose_number_is_none(pair: Pair) -> None:
    """libvfio-user: lib/tran_sock.c, tran_sock_recv_fds() takes it for an error as well."""
    outgoing = pair.client.connection.request(Reset())
    answer = message(13, message_id=outgoing.message_id, flags=0x21, error=4096)
    pair.client.connection.receive(answer)
    reply = pair.client.reply()
    assert reply.message == ErrorReply(13, 0)
    assert reply.remarks == ((Oddity.ERRNO, "0x1000"),)


def test_an_unmap_that_is_answered_by_nothing(pair: Pair) -> None:
    """libvfio-user, for a device without DMA: lib/libvfio-user.c, handle_request()."""
    outgoing = pair.client.connection.request(DmaUnmap(0, 0x1000, 0x2000))
    pair.client.connection.receive(message(3, message_id=outgoing.message_id, flags=1))
    reply = pair.client.reply()
    assert reply.message == DmaUnmapReply(0, 0x1000, 0x2000)
    assert [remark.oddity for remark in reply.remarks] == [Oddity.NO_PAYLOAD]


@pytest.mark.parametrize(
    ("asked", "payload"),
    [
        # SPDK: lib/vfio_user/host/vfio_user.c, vfio_user_get_dev_region_info(): its buffer without
        # one structure.
        (GetRegionInfo(4064, 7), struct.pack("=IIIIQQ", 4064, 0, 7, 0, 0, 0) + bytes(4032)),
        (Reset(), b"x"),
        (DmaUnmap(0, 0x1000, 0x1000), struct.pack("=IIQQ", 24, 0, 0x1000, 0x1000) + bytes(8)),
    ],
)
def test_more_payload_than_there_should_be(pair: Pair, asked: Message, payload: bytes) -> None:
    pair.server.connection.receive(message(asked.command, payload))
    request = pair.server.request()
    assert request.message == asked
    assert [remark.oddity for remark in request.remarks] == [Oddity.LONG_PAYLOAD]


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (2, struct.pack("=IIQQQ", 31, 3, 0, 0, 4096)),
        (2, bytes(31)),
        (3, bytes(8)),
        (5, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0)),
        (8, struct.pack("=IIIII", 22, 34, 0, 0, 3) + bytes(2)),
        (9, bytes(15)),
        (10, struct.pack("=QII", 0, 0, 4) + bytes(3)),
        (15, struct.pack("=Q", 2) + bytes(24)),
    ],
)
def test_payloads_that_make_no_sense(pair: Pair, command: int, payload: bytes) -> None:
    """libvfio-user answers each of them by EINVAL, and lives (lib/libvfio-user.c, lib/irq.c)."""
    pair.server.connection.receive(message(command, payload), (50,))
    pair.server.makes_no_sense("")
    assert pair.server.closed == [50]


def test_a_clients_answer_that_makes_no_sense(pair: Pair) -> None:
    """It is the end of that access, and of nothing else."""
    outgoing = pair.server.connection.request(DmaRead(0, 4))
    answer = message(11, struct.pack("=QQ", 0, 9), message_id=outgoing.message_id, flags=1)
    pair.server.connection.receive(answer, (9,))
    reply = pair.server.reply()
    assert isinstance(reply.message, InvalidReply)
    assert pair.server.connection.outstanding == 0
    assert pair.server.closed == [9]


@pytest.mark.parametrize(
    ("role", "command", "payload"),
    [
        (Role.SERVER, 11, struct.pack("=QQ", 0, 1)),
        (Role.SERVER, 12, struct.pack("=QQ", 0, 0)),
        (Role.CLIENT, 13, b""),
        (Role.CLIENT, 2, bytes(32)),
        (Role.CLIENT, 1, bytes(4)),
    ],
)
def test_commands_that_go_the_other_way(
    pair: Pair, role: Role, command: int, payload: bytes
) -> None:
    victim, _ = pair.of(role)
    victim.connection.receive(message(command, payload))
    victim.makes_no_sense("not a command for|VERSION")


def test_unknown_commands_are_requests(pair: Pair) -> None:
    for command in (0, 14, 16, 17, 18, 999, 0xFFFF):
        pair.server.connection.receive(message(command, b"what", message_id=command))
        request = pair.server.request()
        assert request.message == UnknownRequest(command, b"what")
        assert pair.server.connection.error(request, 95).message_id == command


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (message(13, message_id=0, flags=1), "a reply to REGION_READ"),
        (message(9, message_id=1, flags=1), "a reply to nothing"),
        (message(9, message_id=0, flags=1), "0x0 bytes"),
        (message(9, struct.pack("=QII", 0, 0, 5) + bytes(5), message_id=0, flags=1), "0x5 done"),
        (message(9, struct.pack("=QII", 1, 0, 4) + bytes(4), message_id=0, flags=1), "offset 0x1"),
    ],
)
def test_answers_that_are_none(pair: Pair, answer: bytes, match: str) -> None:
    client = pair.client
    # The handshake took the first id.
    client.connection.receive(b"")
    outgoing = client.connection.request(RegionRead(0, 0, 4))
    shifted = struct.pack("=H", struct.unpack_from("=H", answer)[0] + outgoing.message_id)
    client.connection.receive(shifted + answer[2:])
    client.fails(match)


def test_a_second_answer(pair: Pair) -> None:
    client = pair.client
    answer = message(13, message_id=client.connection.request(Reset()).message_id, flags=1)
    client.connection.receive(answer + answer)
    client.reply()
    client.fails("a reply to nothing")


def test_an_answer_to_what_wanted_none(pair: Pair) -> None:
    outgoing = pair.client.connection.request(Reset(), no_reply=True)
    pair.client.connection.receive(message(13, message_id=outgoing.message_id, flags=1))
    pair.client.fails("a reply to nothing")


def test_more_data_than_was_announced() -> None:
    pair = Pair(server=Capabilities(max_data_xfer_size=64))
    # Messages as large as a VERSION pass the header's check, so that the count itself has to be
    # looked at.
    pair.server.connection.receive(message(10, struct.pack("=QII", 0, 0, 65) + bytes(65)))
    pair.server.makes_no_sense("0x41 bytes of data, limit 0x40")
    pair.server.connection.receive(message(9, struct.pack("=QII", 0, 0, 65)))
    pair.server.makes_no_sense("0x41 bytes of data, limit 0x40")


@pytest.mark.parametrize("role", Role)
def test_a_stream_that_ends(pair: Pair, role: Role) -> None:
    victim, _ = pair.of(role)
    victim.connection.receive_eof()
    assert victim.connection.next_event() is victim.connection.next_event() is CLOSED


@pytest.mark.parametrize("size", range(1, 32))
def test_a_stream_that_ends_in_a_message(pair: Pair, size: int) -> None:
    data = pair.client.connection.request(DmaMap(3, 0, 0, 4096)).data
    pair.server.connection.receive(data[:size], (60,))
    assert pair.server.connection.next_event() is NEED_DATA
    assert pair.server.connection.wanted == (16 - size if size < 16 else 48 - size)
    pair.server.connection.receive_eof()
    pair.server.fails("the stream ends")
    assert 60 in pair.server.closed


def test_messages_before_the_end_of_the_stream_count(pair: Pair) -> None:
    pair.server.feed(pair.client.connection.request(Reset()))
    pair.server.connection.receive_eof()
    pair.server.request()
    assert pair.server.connection.next_event() is CLOSED


# -- descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "count", "taken"),
    [
        (message(13), 1, 0),
        (message(2, struct.pack("=IIQQQ", 32, 3, 0, 0, 4096)), 2, 1),
        # SPDK: lib/vfio_user/host/vfio_user.c, vfio_user_dev_dma_map_unmap().
        (message(3, struct.pack("=IIQQ", 24, 0, 0, 4096)), 1, 0),
        (message(8, struct.pack("=IIIII", 20, 36, 0, 0, 17)), 17, 16),
        (message(999), 17, 16),
    ],
)
def test_descriptors_that_were_not_asked_for(
    pair: Pair, data: bytes, count: int, taken: int
) -> None:
    """They are closed, and the message is taken (libvfio-user: lib/libvfio-user.c, free_msg())."""
    numbers = list(range(1000, 1000 + count))
    pair.server.connection.receive(data, numbers)
    request = pair.server.request()
    assert list(request.fds) == numbers[:taken]
    assert sorted(pair.server.closed) == numbers[taken:]
    assert request.remarks == ((Oddity.DESCRIPTORS, f"{count - taken} too many"),)


def test_more_descriptors_than_a_message_can_have(pair: Pair) -> None:
    pair.server.connection.receive(message(999)[:4], range(1000, 1300))
    pair.server.fails("300 descriptors in one message")
    assert sorted(pair.server.closed)[-300:] == list(range(1000, 1300))


def test_descriptors_one_by_one_with_every_byte(pair: Pair) -> None:
    """The limit holds for a message however its descriptors trickle in."""
    data = message(999, bytes(4000))
    for number in range(254):
        pair.server.connection.receive(data[number : number + 1], (1000 + number,))
        if number < 253:
            assert pair.server.connection.next_event() is NEED_DATA
    pair.server.fails("254 descriptors")
    assert sorted(pair.server.closed)[-254:] == list(range(1000, 1254))


def test_descriptors_with_an_answer(pair: Pair) -> None:
    outgoing = pair.client.connection.request(Reset())
    pair.client.connection.receive(message(13, message_id=outgoing.message_id, flags=1), (9,))
    assert pair.client.reply().message == ResetReply()
    assert pair.client.closed == [9]


def test_descriptors_with_an_error_reply(pair: Pair) -> None:
    outgoing = pair.client.connection.request(GetRegionInfo(32, 0))
    answer = message(5, message_id=outgoing.message_id, flags=0x21, error=22)
    pair.client.connection.receive(answer, (9,))
    assert pair.client.reply().message == ErrorReply(5, 22)
    assert pair.client.closed == [9]


def test_nobody_takes_the_descriptors(pair: Pair) -> None:
    pair.server.feed(pair.client.connection.request(UnknownRequest(999, b""), (1, 2, 3)))
    request = pair.server.request()
    assert repr(request.fds) == "<Descriptors [1, 2, 3]>"
    assert request.fds.take(1) == 2
    del request
    pair.server.connection.close()  # it remembers the request, which is not answered
    assert sorted(pair.server.closed) == [1, 3]


def test_descriptors_of_no_message_yet(pair: Pair) -> None:
    pair.server.connection.receive(message(2)[:8], (5,))
    pair.server.connection.close()
    pair.server.connection.close()
    assert pair.server.closed == [5]


def test_what_the_edge_rejects(pair: Pair) -> None:
    pair.server.connection.receive(message(13), (5,))
    pair.server.connection.reject("too bad")
    pair.server.connection.reject("worse")
    pair.server.fails("too bad")
    assert 5 in pair.server.closed


def test_more_descriptors_than_the_peer_takes() -> None:
    pair = Pair(server=Capabilities(max_msg_fds=0))
    with pytest.raises(LocalProtocolError, match="1 descriptors, limit 0"):
        pair.client.connection.request(DmaMap(3, 0, 0, 4096), (5,))
    with pytest.raises(LocalProtocolError, match="1 descriptors, limit 0"):
        pair.client.connection.request(Reset(), (5,))


# -- what this side may not send -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "refused"),
    [
        (Role.CLIENT, DmaRead(0, 1)),
        (Role.CLIENT, DmaWrite(0, b"x")),
        (Role.CLIENT, ResetReply()),
        (Role.CLIENT, UnknownRequest(13, b"")),
        (Role.CLIENT, UnknownRequest(1 << 16, b"")),
        (Role.CLIENT, RegionRead(0, -1, 1)),
        (Role.CLIENT, RegionRead(1 << 32, 0, 1)),
        (Role.CLIENT, RegionRead(0, 0, (1 << 20) + 1)),
        (Role.CLIENT, RegionWrite(0, 0, bytes((1 << 20) + 1))),
        (Role.SERVER, Reset()),
        (Role.SERVER, DmaRead(0, (1 << 20) + 1)),
        (Role.SERVER, DmaRead(1 << 64, 1)),
    ],
)
def test_requests_that_may_not_be_made(pair: Pair, role: Role, refused: Message) -> None:
    side, _ = pair.of(role)
    before = side.connection.outstanding
    with pytest.raises(LocalProtocolError) as caught:
        side.connection.request(refused)
    assert caught.value.command == refused.command
    assert side.connection.outstanding == before
    assert not side.connection.closed


def test_answers_that_may_not_be_given(pair: Pair) -> None:
    server = pair.server
    server.feed(pair.client.connection.request(RegionRead(0, 0, 4)))
    request = server.request()
    for wrong in (
        ResetReply(),
        UnknownReply(9, b""),
        RegionReadReply(0, 0, bytes(5)),
        RegionReadReply(0, 1, bytes(4)),
    ):
        with pytest.raises(LocalProtocolError):
            server.connection.reply(request, wrong)
    for number in (0, -1, 4096):
        with pytest.raises(LocalProtocolError, match="is no errno"):
            server.connection.error(request, number)
    server.connection.reply(request, RegionReadReply(0, 0, bytes(4)))
    with pytest.raises(LocalProtocolError, match="was answered"):
        server.connection.reply(request, RegionReadReply(0, 0, bytes(4)))
    with pytest.raises(LocalProtocolError, match="was answered"):
        server.connection.error(request, 22)


def test_a_closed_connection(pair: Pair) -> None:
    server = pair.server
    server.feed(pair.client.connection.request(Reset()))
    request = server.request()
    server.connection.close()
    for call in (
        server.connection.next_event,
        lambda: server.connection.receive(b"x", (3,)),
        lambda: server.connection.request(DmaRead(0, 1)),
        lambda: server.connection.reply(request, ResetReply()),
    ):
        with pytest.raises(LocalProtocolError, match="the connection is closed"):
            call()
    assert server.closed == [3]


def test_errors_are_one_family() -> None:
    assert issubclass(RemoteProtocolError, ProtocolError)
    assert issubclass(LocalProtocolError, ProtocolError)
    assert json.loads(OWN_CAPABILITIES.pack()[:-1])["capabilities"]["max_msg_fds"] == 16
