"""
DMA by message, against servers that wait for its answer, with a socket of their own and without.

The rules are the specification's, VFIO_USER_VERSION, "Reply"; the server's behaviour is
libvfio-user's (tests/synchronous_server.py names its source).
"""

import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from descriptors import open_descriptors
from ramblock import GuestMemory, PageState, RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.dma.vfio_user import Link, Reply, Request, Role
from ramblock.dma.vfio_user.connection import OWN_CAPABILITIES
from ramblock.dma.vfio_user.messages import (
    DmaMap,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    GetDeviceInfo,
    RegionWrite,
    Version,
    VersionReply,
)
from ramblock.errors import RemoteProtocolError
from ramblock.probe import Probe, Rule
from ramblock.units import PAGE_SIZE
from ramblock.vfio.probe_registers import Register
from synchronous_server import SynchronousServer

P = PAGE_SIZE
BASE = 1 << 32


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "no twin"])
def test_conversions_beside_dma_by_message(twin: bool) -> None:
    """Neither side takes the other's command for an answer, and nothing is poisoned."""
    ours, theirs = socket.socketpair()
    server = SynchronousServer(theirs, twin=twin)
    with RamBlock.create("ram", 64 * P, private="stand-in") as block:
        memory = GuestMemory()
        memory.map(block, BASE)
        target = VfioUserTarget(ours)
        mapper = memory.attach(target)
        over = threading.Event()
        failed: list[BaseException] = []

        def run_the_device() -> None:
            try:
                while not over.is_set():
                    target.region_write(0, 0, b"go")
                    target.region_read(0, 0, 4)
                    target.reset()
            except BaseException as error:  # told below
                failed.append(error)

        threads = [threading.Thread(target=run_the_device) for _ in range(3)]
        for thread in threads:
            thread.start()
        end = monotonic() + float(os.environ.get("RAMBLOCK_TWIN_SECONDS", "1.5"))
        rounds = 0
        while monotonic() < end:
            for page in range(rounds % 7, 64, 9):
                memory.convert(BASE + page * P, P, PageState.SHARED)
            memory.convert(BASE, 64 * P, PageState.PRIVATE)
            rounds += 1
        over.set()
        for thread in threads:
            thread.join()
        assert not failed
        assert not memory.poisoned
        memory.detach(mapper)
        assert target.violations == 0
        target.close()
        server.join()
        assert server.error is None
        assert server.accesses > 0
        assert rounds > 1


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "no twin"])
def test_commands_while_the_device_runs(twin: bool) -> None:
    """Without a twin they wait until the region access is answered; with one they go at once."""
    ours, theirs = socket.socketpair()
    running, go_on = threading.Event(), threading.Event()

    def before_answer() -> None:
        running.set()
        assert go_on.wait(20)

    server = SynchronousServer(theirs, twin=twin, before_answer=before_answer)
    with RamBlock.create("ram", P) as block:
        target = VfioUserTarget(ours)
        access = threading.Thread(target=lambda: target.region_write(0, 0, b"go"))
        access.start()
        assert running.wait(20)
        map_ = threading.Thread(
            target=lambda: target.map(BASE, HostRange(block.fd, 0, block.address, P))
        )
        map_.start()
        sleep(0.1)
        waiting = bytes(theirs.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT)) if twin else None
        if not twin:
            with pytest.raises(BlockingIOError):
                theirs.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        else:
            assert waiting is not None
            assert waiting[2:] == b"\x02\0"
        go_on.set()
        access.join()
        map_.join()
        target.close()
    server.join()
    assert server.error is None


def answer_version(sock: socket.socket, twin: object, fds: list[int]) -> None:
    header = sock.recv(16, socket.MSG_WAITALL)
    message_id, _, size, *_ = struct.unpack("=HHIII", header)
    offered = json.loads(sock.recv(size - 16)[4:-1])["capabilities"]["twin_socket"]
    assert offered == {"supported": True}
    data = bytes(4) + json.dumps({"capabilities": {"twin_socket": twin}}).encode() + b"\0"
    header = struct.pack("=HHIII", message_id, 1, 16 + len(data), 1, 0)
    socket.send_fds(sock, [header + data], fds)


@pytest.mark.parametrize(
    ("twin", "kinds", "match"),
    [
        ({"supported": True}, ["stream"], "descriptor None"),
        ({"supported": True, "fd_index": 1}, ["stream"], "descriptor 1, and 1"),
        ({"supported": True, "fd_index": 0}, [], "descriptor 0, and 0"),
        ({"supported": True, "fd_index": 0}, ["file"], "no socket"),
        ({"supported": True, "fd_index": 0}, ["datagram"], "no UNIX stream socket"),
        ({"supported": True, "fd_index": 16}, ["stream"] * 17, "descriptor 16, and 16"),
        ({"supported": True, "fd_index": 1}, ["file", "stream"], None),
        ({"supported": False, "fd_index": 9}, [], None),
    ],
)
def test_answers_about_a_twin(twin: object, kinds: list[str], match: str | None) -> None:
    """An inconsistent one ends the connection, as the specification wants it."""
    ours, theirs = socket.socketpair()
    fds, others = [], []
    for kind in kinds:
        if kind == "file":
            fds.append(os.memfd_create("no socket"))
        else:
            pair = socket.socketpair(
                type=socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM
            )
            fds.append(pair[0].detach())
            others.append(pair[1])
    thread = threading.Thread(target=answer_version, args=(theirs, twin, fds))
    thread.start()
    if match is None:
        VfioUserTarget(ours).close()
    else:
        with pytest.raises(RemoteProtocolError, match=match):
            VfioUserTarget(ours)
    thread.join()
    for fd in fds:
        os.close(fd)
    for sock in [theirs, *others]:
        sock.close()


class TwinClient:
    """A client of the probe with both sockets."""

    def __init__(self, path: Path, *, max_msg_fds: int = 8) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        own = replace(OWN_CAPABILITIES, twin_socket=True, max_msg_fds=max_msg_fds)
        self.link = Link(sock, Role.CLIENT, own)
        self.link.send(self.link.connection.request(Version(0, 0, own)), 20)
        with self.reply() as reply:
            assert isinstance(reply.message, VersionReply)
            self.twin = None
            if reply.message.capabilities.twin_socket:
                index = reply.message.capabilities.twin_fd_index
                assert index is not None
                self.twin = self.link.twin(socket.socket(fileno=reply.fds.take(index)))

    def reply(self) -> Reply:
        event = self.link.receive(20)
        assert isinstance(event, Reply)
        return event

    def close(self) -> None:
        self.link.close()
        if self.twin is not None:
            self.twin.close()


def test_the_probe_has_one(tmp_path: Path) -> None:
    with Probe(tmp_path / "probe.sock") as probe:
        client = TwinClient(probe.path)
        assert client.twin is not None
        connection = client.link.connection
        for message in (
            DmaMap(3, 0, 0, P),
            RegionWrite(0, Register.ADDRESS, struct.pack("<QII", 0, 4, 1)),
        ):
            client.link.send(connection.request(message), 20)
        with client.reply():
            pass
        # While the device waits, a command on the main socket waits too.
        client.link.send(connection.request(GetDeviceInfo()), 20)
        question = client.twin.receive(20)
        assert isinstance(question, Request)
        assert question.message == DmaRead(0, 4)
        answer = DmaReadReply(0, b"twin")
        client.twin.send(client.twin.connection.reply(question, answer), 20)
        for _ in range(2):
            client.reply().close()
        client.close()
        probe.wait_for(lambda: probe.client is None)
        assert probe.record.clean
        # Not to a client that takes no descriptor.
        client = TwinClient(probe.path, max_msg_fds=0)
        assert client.twin is None
        client.close()
        probe.wait_for(lambda: probe.client is None)


def test_commands_on_the_wrong_socket(tmp_path: Path) -> None:
    with Probe(tmp_path / "probe.sock") as probe:
        client = TwinClient(probe.path)
        assert client.twin is not None
        client.link.send(client.link.connection.request(DmaMap(3, 0, 0, P)), 20)
        client.reply().close()
        wrong = client.twin.connection.request(DmaUnmap(0, 0, P))
        client.twin.send(wrong, 20)
        setting = struct.pack("<QII", 0, 4, 1)
        client.link.send(
            client.link.connection.request(RegionWrite(0, Register.ADDRESS, setting)), 20
        )
        refusal = None
        while True:
            event = client.twin.receive(20)
            assert event is not None
            if isinstance(event, Request):
                break
            refusal = event.message
        client.twin.send(client.twin.connection.error(event, errno.EFAULT), 20)
        if refusal is None:
            with suppress(TimeoutError):
                late = client.twin.receive(1)
                refusal = None if late is None else late.message
        client.reply().close()
        client.close()
        probe.wait_for(lambda: probe.client is None)
        assert probe.record.broken[Rule.MESSAGE] == 1
        assert refusal is not None
