"""A connection on a real socket: descriptors, deadlines, and what the kernel does with both."""

import os
import resource
import socket
import struct
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from descriptors import open_descriptors
from ramblock.dma.vfio_user import (
    CLOSED,
    NEED_DATA,
    OWN_CAPABILITIES,
    Capabilities,
    Link,
    Reply,
    Request,
    Role,
)
from ramblock.dma.vfio_user.events import Oddity
from ramblock.dma.vfio_user.link import connect
from ramblock.dma.vfio_user.messages import (
    DmaMap,
    DmaMapReply,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    Reset,
    ResetReply,
    UnknownRequest,
    Version,
    VersionReply,
)
from ramblock.errors import LocalProtocolError, RemoteProtocolError


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def handshake(client: Link, server: Link) -> None:
    client.send(client.connection.request(Version(0, 0, client.connection.own)), 5)
    request = server.receive(5)
    assert isinstance(request, Request)
    server.send(server.connection.reply(request, VersionReply(0, 0, server.connection.own)), 5)
    assert isinstance(client.receive(5), Reply)


def linked(capabilities: Capabilities = OWN_CAPABILITIES) -> tuple[Link, Link]:
    ours, theirs = socket.socketpair()
    client, server = Link(ours, Role.CLIENT), Link(theirs, Role.SERVER, capabilities)
    handshake(client, server)
    return client, server


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    client, server = linked()
    with client, server:
        yield client, server


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Link]]:
    """A server behind its handshake, and the bare socket of its client."""
    ours, theirs = socket.socketpair()
    with ours, Link(theirs, Role.SERVER) as server:
        ours.sendall(struct.pack("=HHIIIHH", 1, 1, 20, 0, 0, 0, 0))
        request = server.receive(5)
        assert isinstance(request, Request)
        server.send(server.connection.reply(request, VersionReply(0, 0, OWN_CAPABILITIES)), 5)
        ours.recv(4096)
        yield ours, server


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def content_of(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


def test_a_descriptor_arrives_with_its_message(links: tuple[Link, Link]) -> None:
    client, server = links
    fds = [memfd(b"first"), memfd(b"second")]
    for number, fd in enumerate(fds):
        client.queue(client.connection.request(Reset()))
        client.queue(client.connection.request(DmaMap(3, 0, number * 4096, 4096), (fd,)))
        client.queue(client.connection.request(RegionRead(0, 0, 1)))
    assert client.flush()
    for fd in fds:
        os.close(fd)
    found = []
    for _ in range(6):
        with server.receive(5) as request:  # type: ignore[union-attr]  # None would fail here
            assert isinstance(request, Request)
            found.append([content_of(fd) for fd in request.fds])
            for fd in request.fds:
                assert not os.get_inheritable(fd)
    assert found == [[], [b"first"], [], [], [b"second"], []]
    assert server.event() is NEED_DATA


def test_messages_and_descriptors_in_any_pieces(raw: tuple[socket.socket, Link]) -> None:
    """
    Whatever pieces the peer sends, even several messages in one call with a descriptor each in
    between.
    """
    ours, server = raw
    random = Random(5)
    for _ in range(200):
        count = random.randint(1, 4)
        messages = [struct.pack("=HHIII", number, 999, 16 + size, 0, 0) + bytes(size)
                    for number, size in enumerate(random.choices(range(70), k=count))]  # fmt: skip
        stream = b"".join(messages)
        starts = [sum(map(len, messages[:number])) for number in range(count)]
        position = 0
        expected: list[int] = [0] * count
        while position < len(stream):
            size = random.randint(1, len(stream) - position)
            fds = [0] * random.randint(0, 2)
            # The kernel hands descriptors out with the first byte of what they were sent with.
            owner = max(number for number in range(count) if starts[number] <= position)
            expected[owner] += len(fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            ours.sendmsg([stream[position : position + size]], rights)
            position += size
        if max(expected) > 16:
            continue
        for number in range(count):
            request = server.receive(5)
            assert isinstance(request, Request)
            with request:
                assert request.message_id == number
                assert len(request.fds) == expected[number]


def send_descriptors(sock: socket.socket, data: bytes, count: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [0] * count))]
    sock.sendmsg([data], rights)


def test_three_hundred_descriptors(raw: tuple[socket.socket, Link]) -> None:
    ours, server = raw
    header = struct.pack("=HHIII", 1, 999, 20, 0, 0)
    send_descriptors(ours, header[:8], 150)
    send_descriptors(ours, header[8:], 150)
    with pytest.raises(RemoteProtocolError, match="300 descriptors"):
        server.receive(5)
    assert server.closed


def test_as_many_as_the_kernel_passes_at_once(raw: tuple[socket.socket, Link]) -> None:
    ours, server = raw
    send_descriptors(ours, struct.pack("=HHIII", 1, 999, 16, 0, 0), 253)
    with server.receive(5) as request:  # type: ignore[union-attr]  # None would fail here
        assert len(request.fds) == 16
        assert request.remarks == ((Oddity.DESCRIPTORS, "237 too many"),)


def test_no_room_for_descriptors(raw: tuple[socket.socket, Link]) -> None:
    """
    The process may not have as many as came: some are lost, and nobody can say which message is
    whole.
    """
    ours, server = raw
    send_descriptors(ours, struct.pack("=HHIII", 1, 999, 16, 0, 0), 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, hard))
    try:
        with pytest.raises(RemoteProtocolError, match="could be received"):
            server.receive(5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_of_half_a_message_are_closed(raw: tuple[socket.socket, Link]) -> None:
    ours, server = raw
    send_descriptors(ours, b"\1\0\2\0", 5)
    with pytest.raises(TimeoutError):
        server.receive(0.05)
    assert not server.closed
    server.close()


@pytest.mark.parametrize("data", [b"", b"\1\0\2\0"])
def test_the_peer_goes(raw: tuple[socket.socket, Link], data: bytes) -> None:
    ours, server = raw
    ours.sendall(data)
    ours.close()
    if data:
        with pytest.raises(RemoteProtocolError, match="the stream ends"):
            server.receive(5)
        with pytest.raises(LocalProtocolError):
            server.receive(5)
    else:
        assert server.receive(5) is None
        assert server.event() is CLOSED


def test_the_peer_goes_without_reading(raw: tuple[socket.socket, Link]) -> None:
    """The kernel says ECONNRESET then."""
    ours, server = raw
    ours.sendall(struct.pack("=HHIII", 1, 13, 16, 0, 0))
    request = server.receive(5)
    assert isinstance(request, Request)
    server.send(server.connection.reply(request, ResetReply()), 5)
    ours.close()
    assert server.receive(5) is None


def test_sending_to_a_peer_that_is_gone(raw: tuple[socket.socket, Link]) -> None:
    ours, server = raw
    ours.sendall(struct.pack("=HHIII", 1, 13, 16, 0, 0))
    request = server.receive(5)
    assert isinstance(request, Request)
    ours.close()
    with pytest.raises(BrokenPipeError):
        server.send(server.connection.reply(request, ResetReply()), 5)
    assert server.closed
    assert server.fileno() == -1


def test_a_peer_that_does_not_read(links: tuple[Link, Link]) -> None:
    client, server = links
    data = bytes(1 << 20)

    def send_until_it_is_stuck() -> None:
        while True:
            client.send(client.connection.request(RegionWrite(0, 0, data), no_reply=True), 0.05)

    with pytest.raises(TimeoutError, match="send"):
        send_until_it_is_stuck()
    assert client.unsent > 0
    # Nothing is lost: what was begun goes on where it stopped.
    thread = threading.Thread(target=lambda: client.send(client.connection.request(Reset()), 20))
    thread.start()
    while not isinstance((request := server.receive(20)).message, Reset):  # type: ignore[union-attr]
        assert request.message == RegionWrite(0, 0, data)  # type: ignore[union-attr]
    thread.join()
    assert client.unsent == 0


def test_a_deadline_is_for_the_whole_message(raw: tuple[socket.socket, Link]) -> None:
    ours, server = raw
    stop = threading.Event()

    def trickle() -> None:
        for byte in struct.pack("=HHIII", 1, 999, 10_000, 0, 0) + bytes(9_000):
            if stop.wait(0.005):
                return
            ours.send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(TimeoutError, match="receive"):
        server.receive(0.2)
    stop.set()
    thread.join()


def test_queued_messages_go_out_while_waiting(links: tuple[Link, Link]) -> None:
    client, server = links
    big = bytes(1 << 20)
    outgoing = [client.connection.request(RegionWrite(0, 0, big)) for _ in range(3)]
    for one in outgoing:
        client.queue(one)

    def serve() -> None:
        for _ in outgoing:
            request = server.receive(20)
            assert isinstance(request, Request)
            server.send(server.connection.error(request, 5), 20)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in outgoing:
        assert isinstance(client.receive(20), Reply)
    thread.join()


def test_a_real_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with Link(connect(path, 5), Role.CLIENT) as client:
            sock, _ = listener.accept()
            with Link(sock, Role.SERVER) as server:
                handshake(client, server)
                fd = memfd(b"over there")
                client.send(client.connection.request(DmaMap(3, 0, 0, 4096), (fd,)), 5)
                os.close(fd)
                request = server.receive(5)
                assert isinstance(request, Request)
                with request:
                    assert [content_of(fd) for fd in request.fds] == [b"over there"]
                    server.send(server.connection.reply(request, DmaMapReply()), 5)
                reply = client.receive(5)
                assert isinstance(reply, Reply)
                assert reply.message == DmaMapReply()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(tmp_path / "socket")
    with pytest.raises(OSError, match="too long"):
        connect("x" * 200)


def test_large_messages(links: tuple[Link, Link]) -> None:
    client, server = links
    data = Random(1).randbytes(1 << 20)

    def serve() -> None:
        request = server.receive(20)
        assert isinstance(request, Request)
        server.send(server.connection.reply(request, RegionReadReply(0, 0, data)), 20)

    thread = threading.Thread(target=serve)
    thread.start()
    client.send(client.connection.request(RegionRead(0, 0, 1 << 20)), 20)
    reply = client.receive(20)
    assert isinstance(reply, Reply)
    assert reply.message == RegionReadReply(0, 0, data)
    thread.join()


def test_what_arrives_is_not_piled_up(links: tuple[Link, Link]) -> None:
    """It reads no further than the message that it gives out."""
    client, server = links
    for _ in range(10):
        client.send(client.connection.request(UnknownRequest(999, bytes(100)), (0,)), 5)
    before = len(open_descriptors())
    request = server.receive(5)
    assert isinstance(request, Request)
    assert len(open_descriptors()) == before + 1
    request.close()
