"""
Hostile peers: any bytes and descriptors give events or a protocol error, and nothing else.

Both roles.
"""

import os
import socket
import struct
import threading
from array import array
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from descriptors import open_descriptors
from hostile_peer import QUESTIONS, Victim, play_bytes
from ramblock.dma import VfioUserTarget
from ramblock.dma.vfio_user import OWN_CAPABILITIES, Link, Role
from ramblock.dma.vfio_user.header import Header
from ramblock.dma.vfio_user.messages import Version
from ramblock.errors import DmaError, ProtocolError, RemoteProtocolError

# Numbers that mean something, beside any.
SIZES = st.sampled_from([0, 1, 15, 16, 17, 32, 48, 0x4050, 0x10_0040, 2**31, 2**32 - 1])
COMMANDS = st.integers(0, 20) | st.integers(0, 0xFFFF)
FLAGS = st.sampled_from([0, 1, 0x10, 0x21, 0x11, 2, 0xF, 0x40, 0xFFFF_FFFF])
WORDS = st.sampled_from([0, 1, 16, 24, 32, 4096, 2**31, 2**32 - 1])
LONGS = st.sampled_from([0, 1, 4096, 2**32, 2**63, 2**64 - 4096, 2**64 - 1])


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    parts = draw(
        st.lists(
            WORDS.map(lambda value: struct.pack("=I", value))
            | LONGS.map(lambda value: struct.pack("=Q", value))
            | st.binary(max_size=20),
            max_size=8,
        )
    )
    return b"".join(parts)


@st.composite
def hostile_messages(draw: st.DrawFn) -> bytes:
    """Something with a header: any field may lie."""
    payload = draw(payloads())
    size = draw(st.just(16 + len(payload)) | SIZES)
    header = struct.pack(
        "=HHIII",
        draw(st.integers(0, 3) | st.integers(0, 0xFFFF)),
        draw(COMMANDS),
        size,
        draw(st.sampled_from([0, 1]) | FLAGS),
        draw(st.sampled_from([0, 22, 4095, 4096, 2**32 - 1])),
    )
    return header + payload


def valid_stream(role: Role) -> bytes:
    """What a well-behaved client asks that server, or that client's server asks it."""
    other = Victim(Role.CLIENT if role is Role.SERVER else Role.SERVER, negotiated=True)
    stream = b""
    for question in QUESTIONS:
        if (question.command in (11, 12)) is (role is Role.CLIENT):
            stream += other.connection.request(question).data
    return stream


@st.composite
def broken_streams(draw: st.DrawFn, stream: bytes) -> bytes:
    """A valid stream with bytes changed, taken out, put in or said twice."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(stream)))
        end = draw(st.integers(start, min(start + 40, len(stream))))
        middle = draw(st.sampled_from([b"", stream[start:end] * 2]) | st.binary(max_size=8))
        stream = stream[:start] + middle + stream[end:]
    return stream


def feed_in_pieces(victim: Victim, stream: bytes, cuts: list[tuple[int, int]]) -> None:
    """Cut *stream* at these places, with so many descriptors behind each cut."""
    start, fds = 0, 0
    for end, count in [*sorted(cuts), (len(stream), 0)]:
        end = min(end, len(stream))
        victim.feed(stream[start:end], fds)
        start, fds = end, count


CUTS = st.lists(st.tuples(st.integers(0, 800), st.sampled_from([0, 0, 0, 1, 2, 16, 17, 300])))


@given(st.binary(max_size=300))
@example(b"")
@example(b"\x03" + bytes([0x7F, 0]))
def test_any_bytes(data: bytes) -> None:
    play_bytes(data)


@pytest.mark.parametrize("role", Role)
@given(
    messages=st.lists(hostile_messages(), max_size=6),
    cuts=CUTS,
    negotiated=st.booleans(),
    asked=st.lists(st.integers(0, len(QUESTIONS) - 1), max_size=4),
    eof=st.booleans(),
)
def test_any_messages(
    role: Role,
    messages: list[bytes],
    cuts: list[tuple[int, int]],
    negotiated: bool,
    asked: list[int],
    eof: bool,
) -> None:
    victim = Victim(role, negotiated=negotiated)
    for which in asked:
        victim.ask(which)
    feed_in_pieces(victim, b"".join(messages), cuts)
    if eof:
        victim.end()
    victim.check()


STREAMS = {role: valid_stream(role) for role in Role}


@pytest.mark.parametrize("role", Role)
@given(data=st.data(), cuts=CUTS)
def test_streams_that_were_valid(
    role: Role, data: st.DataObject, cuts: list[tuple[int, int]]
) -> None:
    victim = Victim(role, negotiated=True)
    feed_in_pieces(victim, data.draw(broken_streams(STREAMS[role])), cuts)
    victim.answer(data.draw(st.integers(0, 9)))
    victim.check()


@pytest.mark.parametrize("role", Role)
def test_the_streams_are_valid(role: Role) -> None:
    victim = Victim(role, negotiated=True)
    for number in range(len(STREAMS[role])):
        victim.feed(STREAMS[role][number : number + 1], 0)
    assert not victim.dead
    assert len(victim.events) == (2 if role is Role.CLIENT else len(QUESTIONS) - 2)
    victim.check()


def test_a_message_of_four_gigabytes_takes_no_memory() -> None:
    """Its header is refused before anything is kept for it."""
    for role in Role:
        victim = Victim(role, negotiated=True)
        victim.feed(struct.pack("=HHIII", 0, 13, 2**32 - 1, 0, 0), 1)
        assert victim.dead
        victim.check()


def test_bytes_for_ever_take_no_memory() -> None:
    """One byte short of the largest message, again and again."""
    victim = Victim(Role.SERVER, negotiated=True)
    limit = victim.connection.max_message_size
    message = struct.pack("=HHIII", 0, 999, limit, 0, 0) + bytes(limit - 16)
    for _ in range(20):
        victim.feed(message, 0)
        assert len(victim.connection._inbox) == 0
        victim.events.pop().close()
    victim.feed(struct.pack("=HHIII", 0, 999, limit + 1, 0, 0), 0)
    assert victim.dead


# -- over a real socket, with real descriptors -----------------------------------------------------


def send_pieces(sock: socket.socket, stream: bytes, cuts: list[tuple[int, int]]) -> None:
    start = 0
    with suppress(BrokenPipeError, ConnectionResetError):  # the victim has heard enough
        for end, count in [*sorted(cuts), (len(stream), 0)]:
            end = min(end, len(stream))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [0] * min(count, 253)))]
            if end > start:
                sock.sendmsg([stream[start:end]], rights if count else [])
            start = end


@pytest.mark.parametrize("role", Role)
@settings(max_examples=30)
@given(messages=st.lists(hostile_messages(), max_size=6), cuts=CUTS, negotiate=st.booleans())
def test_a_link(
    role: Role, messages: list[bytes], cuts: list[tuple[int, int]], negotiate: bool
) -> None:
    before = open_descriptors()
    ours, theirs = socket.socketpair()
    with theirs, Link(ours, role) as link:
        connection = link.connection
        if role is Role.CLIENT:
            link.send(connection.request(Version(0, 0, connection.own)), 5)
        elif negotiate:
            theirs.sendall(struct.pack("=HHIIIHH", 1, 1, 20, 0, 0, 0, 0))
        send_pieces(theirs, b"".join(messages), cuts)
        theirs.shutdown(socket.SHUT_WR)
        try:
            while (event := link.receive(5)) is not None:
                event.close()
        except ProtocolError:
            assert link.closed
    assert open_descriptors() == before


def negotiate_as_server(sock: socket.socket) -> None:
    header = Header.unpack(sock.recv(4096))
    payload = struct.pack("=HH", 0, 0) + OWN_CAPABILITIES.pack()
    sock.sendall(Header(header.message_id, 1, 16 + len(payload), 1).pack() + payload)


@settings(max_examples=30)
@given(messages=st.lists(hostile_messages(), max_size=6), cuts=CUTS, negotiate=st.booleans())
def test_the_client(messages: list[bytes], cuts: list[tuple[int, int]], negotiate: bool) -> None:
    """Every call of the target ends, with an answer or a DmaError, and nothing is left."""
    before = open_descriptors()
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            if negotiate:
                negotiate_as_server(theirs)
            send_pieces(theirs, b"".join(messages), cuts)
            # Whatever it answers is read, so that it is not stuck.
            theirs.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while theirs.recv(4096):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        target = VfioUserTarget(ours, timeout=5)
    except (DmaError, RemoteProtocolError):
        pass
    else:
        for call in (target.reset, target.device_info, lambda: target.unmap(0, 4096)):
            with suppress(DmaError):
                call()
        assert not isinstance(target.failure, TimeoutError)
        with suppress(DmaError):
            target.close()
    thread.join(20)
    assert not thread.is_alive()
    assert open_descriptors() == before


def test_the_tests_own_descriptors() -> None:
    """The last two find a leak if there is one."""
    before = open_descriptors()
    fd = os.dup(0)
    assert open_descriptors() != before
    os.close(fd)
