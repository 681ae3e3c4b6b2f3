"""
Clients that break the protocol, stall, vanish or lie: the probe says so, and serves the next one.
"""

import errno
import fcntl
import json
import mmap
import os
import re
import resource
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from descriptors import open_descriptors
from ramblock import RamBlock
from ramblock.dma import HostRange, VfioUserTarget
from ramblock.dma.vfio_user import (
    OWN_CAPABILITIES,
    Capabilities,
    Link,
    Reply,
    Request,
    Role,
)
from ramblock.dma.vfio_user.events import Oddity
from ramblock.dma.vfio_user.messages import (
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaUnmap,
    DmaUnmapReply,
    DmaWrite,
    DmaWriteReply,
    ErrorReply,
    GetDeviceInfo,
    Message,
    RegionWrite,
    Reset,
    SetIrqs,
    UnknownRequest,
    Version,
)
from ramblock.dma.vfio_user.numbers import DmaFlags
from ramblock.errors import IommuFault, UsageError
from ramblock.probe import Probe, Rule, UnmapRule
from ramblock.probe import server as server_module
from ramblock.probe import session as session_module
from ramblock.probe.device import ProbeDevice
from ramblock.probe.windows import Note
from ramblock.trace import TraceWriter
from ramblock.vfio.probe_registers import Register

P = 4096
# include/uapi/linux/fcntl.h
F_SEAL_FUTURE_WRITE = 0x0010
VERSION = struct.pack("=HHIII", 0, 1, 20, 0, 0) + struct.pack("=HH", 0, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "probe.sock"


@pytest.fixture
def probe(path: Path) -> Iterator[Probe]:
    before = open_descriptors()
    with Probe(path) as probe:
        yield probe
        served(probe)
    assert probe.error is None
    assert not path.exists()
    assert open_descriptors() == before


def served(probe: Probe) -> None:
    """Nobody is there any more, and the next one is served."""
    probe.wait_for(lambda: probe.client is None)
    target = VfioUserTarget(probe.path)
    assert target.device_info().num_regions == 9
    target.close()
    probe.wait_for(lambda: probe.client is None)


@contextmanager
def raw(probe: Probe) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(probe.path))
        yield sock


class Client:
    """A client that says what it is told to."""

    def __init__(self, path: Path, **capabilities: int) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        self.link = Link(sock, Role.CLIENT, replace(OWN_CAPABILITIES, **capabilities))  # type: ignore[arg-type]
        self.ask(Version(0, 0, self.link.connection.own))

    def ask(self, message: Message, *fds: int) -> Message | int:
        """Return the answer, or the errno of a refusal."""
        self.link.send(self.link.connection.request(message, fds), 60)
        reply = self.link.receive(60)
        assert isinstance(reply, Reply)
        with reply:
            return reply.message.errno if isinstance(reply.message, ErrorReply) else reply.message

    def tell(self, message: Message, *fds: int) -> None:
        """Ask for no answer."""
        self.link.send(self.link.connection.request(message, fds, no_reply=True), 60)


@pytest.fixture
def client(probe: Probe) -> Iterator[Client]:
    client = Client(probe.path)
    yield client
    client.link.close()


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * P)
    yield fd
    os.close(fd)


def map_(address: int, pages: int, *, offset: int = 0, flags: int = 3) -> DmaMap:
    return DmaMap(flags, offset, address, pages * P)


def rules(probe: Probe) -> list[Rule]:
    return [violation.rule for violation in probe.record.violations]


# -- maps and unmaps that cannot be ---------------------------------------------------------------


def test_each_rule_is_told_and_counted(probe: Probe, client: Client, ram: int) -> None:
    assert client.ask(map_(0, 4), ram) == DmaMapReply()
    for message, number, rule in (
        (map_(P, 1), errno.EEXIST, Rule.OVERLAP),
        (DmaMap(3, 0, (1 << 64) - P, 2 * P), errno.EINVAL, Rule.WRAP),
        (DmaMap(3, 0, 8 * P, 0), errno.EINVAL, Rule.EMPTY),
        (DmaMap(3, 0, 8 * P, 17), errno.EINVAL, Rule.UNALIGNED),
        (map_(8 * P, 17), errno.EINVAL, Rule.BEYOND_FILE),
        (map_(8 * P, 1, flags=0), errno.EINVAL, Rule.NO_ACCESS),
        (map_(8 * P, 1, flags=1 << 4 | 3), errno.EINVAL, Rule.UNKNOWN),
        (map_(8 * P, 1, flags=1 << 31 | 3), errno.EINVAL, Rule.UNKNOWN),
        # libvfio-user: lib/libvfio-user.c, handle_dma_map(), is_valid_unmap().
        (map_(8 * P, 1, flags=15), errno.EINVAL, Rule.CONTRADICTION),
        (DmaUnmap(4, 0, P), errno.EINVAL, Rule.UNKNOWN),
        (DmaUnmap(3, 0, P), errno.EINVAL, Rule.CONTRADICTION),
        (DmaUnmap(0, 8 * P, P), errno.ENOENT, Rule.NOT_MAPPED),
        (DmaUnmap(0, P, P), errno.EINVAL, Rule.BISECT),
        (DmaUnmap(2, 0, P), errno.EINVAL, Rule.EMPTY),
    ):
        fds = (ram,) if isinstance(message, DmaMap) else ()
        assert client.ask(message, *fds) == number
        violation = probe.record.violations[-1]
        assert (violation.rule, violation.errno) == (rule, number)
        assert (violation.address, violation.size) == (message.address, message.size)
    assert [(window.address, window.size) for window in probe.windows] == [(0, 4 * P)]
    # The reply repeats the request (the specification, VFIO_USER_DMA_UNMAP).
    assert client.ask(DmaUnmap(2, 0, 0)) == DmaUnmapReply(2, 0, 0)
    assert probe.windows == []


@pytest.mark.parametrize("way", [DmaFlags.MMAP, DmaFlags.FILE_IO])
def test_flags_of_the_newer_version(probe: Probe, client: Client, ram: int, way: DmaFlags) -> None:
    """libvfio-user since June 2026: include/vfio-user.h; lib/libvfio-user.c, handle_dma_map()."""
    assert client.ask(map_(0, 1, flags=way | 3), ram) == DmaMapReply()
    assert probe.record.clean
    assert client.ask(map_(P, 1, flags=way | 3)) == errno.EINVAL
    assert rules(probe) == [Rule.CONTRADICTION]


def test_a_descriptor_that_is_no_memory(probe: Probe, client: Client) -> None:
    one, other = os.pipe()
    assert client.ask(map_(0, 1), one) == errno.EINVAL
    os.close(one)
    os.close(other)
    assert rules(probe) == [Rule.NOT_MEMORY]


def open_again(fd: int, mode: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)


def sealed(seal: int) -> int:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * P)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


@pytest.mark.parametrize(
    ("make", "flags", "number"),
    [
        (lambda ram: open_again(ram, os.O_RDONLY), 3, errno.EACCES),
        (lambda ram: open_again(ram, os.O_RDONLY), 1, None),
        (lambda ram: open_again(ram, os.O_WRONLY), 2, errno.EACCES),
        (lambda ram: open_again(ram, os.O_PATH), 1, errno.EBADF),
        (lambda _: sealed(fcntl.F_SEAL_WRITE), 3, errno.EPERM),
        (lambda _: sealed(F_SEAL_FUTURE_WRITE), 3, errno.EPERM),
        (lambda _: sealed(F_SEAL_FUTURE_WRITE), 1, None),
        (lambda _: sealed(fcntl.F_SEAL_SHRINK), 3, None),
    ],
)
def test_descriptors_that_do_not_allow_it(
    probe: Probe,
    client: Client,
    ram: int,
    make: Callable[[int], int],
    flags: int,
    number: int | None,
) -> None:
    """libvfio-user: lib/dma.c, dma_map_region() gives mmap(2)'s errno; the kernel is asked here."""
    fd = make(ram)
    prot = (mmap.PROT_READ if flags & 1 else 0) | (mmap.PROT_WRITE if flags & 2 else 0)
    if number is None:
        mmap.mmap(fd, P, mmap.MAP_SHARED, prot).close()
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            mmap.mmap(fd, P, mmap.MAP_SHARED, prot)
    assert client.ask(map_(0, 1, flags=flags), fd) == (DmaMapReply() if number is None else number)
    assert rules(probe) == ([] if number is None else [Rule.FILE_ACCESS])
    os.close(fd)


def test_what_wants_no_answer_is_checked_as_well(probe: Probe, client: Client, ram: int) -> None:
    client.tell(map_(0, 1), ram)
    client.tell(map_(0, 1), ram)
    client.tell(DmaUnmap(0, 4 * P, P))
    client.ask(GetDeviceInfo())
    assert rules(probe) == [Rule.OVERLAP, Rule.NOT_MAPPED]
    assert len(probe.windows) == 1


def test_an_unmap_of_several_windows_is_one_call(probe: Probe, client: Client, ram: int) -> None:
    for page in (0, 1, 4):
        client.ask(map_(page * P, 1, offset=page * P), ram)
    assert client.ask(DmaUnmap(0, 0, 8 * P)) == DmaUnmapReply(0, 0, 8 * P)
    assert probe.record.clean
    # But the specification has another rule: "must match exactly a previous mapping".
    assert probe.record.noted == {Note.INEXACT_UNMAP: 1}
    assert "which are 3 windows" in probe.record.first_noted[Note.INEXACT_UNMAP]


def test_exact_unmaps_leave_stale_windows(path: Path, ram: int) -> None:
    with Probe(path, unmap=UnmapRule.EXACT) as probe:
        client = Client(path)
        for page in range(4):
            client.ask(map_(page * P, 1, offset=page * P), ram)
        assert client.ask(DmaUnmap(0, P, 2 * P)) == errno.ENOENT
        assert rules(probe) == [Rule.INEXACT]
        assert [stale.address for stale in probe.record.stale] == [P, 2 * P]
        # Asked again they are not counted again; one of them goes after all.
        assert client.ask(DmaUnmap(0, P, 2 * P)) == errno.ENOENT
        client.ask(DmaUnmap(0, P, P))
        client.link.close()
        probe.wait_for(lambda: probe.client is None)
    assert probe.record.stale_count == 2
    assert [stale.until_ns is None for stale in probe.record.stale] == [False, True]


def test_the_number_of_windows_is_bounded(
    path: Path, ram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Capabilities(max_msg_fds=8, max_dma_maps=2)
    for module in (session_module, server_module):
        monkeypatch.setattr(module, "CAPABILITIES", few)
    with Probe(path) as probe:
        client = Client(path)
        answers = [client.ask(map_(page * 2 * P, 1), ram) for page in range(3)]
        assert answers == [DmaMapReply(), DmaMapReply(), errno.ENOSPC]
        assert rules(probe) == [Rule.TOO_MANY]
        client.link.close()


def test_what_there_is_not(probe: Probe, client: Client) -> None:
    assert client.ask(UnknownRequest(16, b"")) == errno.ENOTSUP
    assert client.ask(DmaUnmap(1, 0, P)) == errno.ENOTSUP
    assert client.ask(SetIrqs(33, 0, 0, 1)) == errno.EINVAL
    assert client.ask(SetIrqs(33, 0, 0, 0)) == errno.EINVAL
    assert client.ask(RegionWrite(0, 0xFFE, b"abcd")) == errno.EINVAL
    assert client.ask(RegionWrite(3, 0, b"abcd")) == errno.EINVAL
    assert probe.record.clean


@pytest.mark.parametrize(
    ("message", "fds", "rule"),
    [
        (SetIrqs(0, 0, 0, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(1, 0, 0, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(32 | 16 | 1, 0, 0, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(32 | 4 | 1, 0, 0, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(8 | 1, 0, 0, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(32 | 1, 0, 7, 0), 0, Rule.INTERRUPTS),
        (SetIrqs(32 | 4, 2, 0, 3), 2, Rule.INTERRUPTS),
        (SetIrqs(32 | 1, 2, 0, 1), 1, Rule.INTERRUPTS),
        (SetIrqs(8 | 1, 3, 0, 1), 0, Rule.INTERRUPTS),
        (SetIrqs(32 | 1, 4, 0, 2), 0, Rule.INTERRUPTS),
        (SetIrqs(64 | 32 | 1, 0, 0, 1), 0, Rule.UNKNOWN),
    ],
)
def test_interrupts_that_cannot_be_set_so(
    probe: Probe, client: Client, ram: int, message: SetIrqs, fds: int, rule: Rule
) -> None:
    """libvfio-user: lib/irq.c, device_set_irqs_validate()."""
    assert client.ask(message, *[ram] * fds) == errno.EINVAL
    assert rules(probe) == [rule]


def test_writes_inside_registers_of_config_space(probe: Probe, client: Client) -> None:
    """libvfio-user: lib/pci.c, pci_config_space_size_for_reg() and its caller."""
    for offset, size in ((4, 2), (0x10, 4), (0x3C, 1), (0x0D, 1)):
        assert not isinstance(client.ask(RegionWrite(7, offset, bytes(size))), int)
    assert not probe.record.noted
    for offset, size in ((5, 1), (0x12, 2)):
        assert not isinstance(client.ask(RegionWrite(7, offset, bytes(size))), int)
    assert probe.record.noted == {Note.CONFIG_WRITE: 2}
    assert probe.record.clean


# -- memory that is not there ----------------------------------------------------------------------


def test_a_file_that_shrinks_after_it_was_mapped(path: Path, ram: int) -> None:
    with Probe(path, touch=True, scribble=True) as probe:
        client = Client(path)
        client.ask(map_(0, 16), ram)
        probe.wait_for(lambda: probe.record.counts["scribble"] > 10)
        assert probe.record.clean
        os.ftruncate(ram, 0)
        probe.wait_for(lambda: probe.record.broken[Rule.UNREACHABLE] > 10)
        with pytest.raises(IommuFault, match="Input/output error"):
            probe.read(0, 8)
        assert client.ask(Reset()) is not None
        client.link.close()
    assert probe.error is None
    assert os.fstat(ram).st_size == 0


def test_a_client_that_never_serves_what_it_mapped(
    probe: Probe, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.2)
    assert client.ask(map_(0, 1)) == DmaMapReply()
    setting = struct.pack("<QII", 0, 8, 1)
    request = client.link.connection.request(RegionWrite(0, Register.ADDRESS, setting))
    client.link.send(request, 60)
    question = client.link.receive(60)
    assert question is not None
    assert question.message == DmaRead(0, 8)
    assert client.link.receive(60) is None
    assert rules(probe) == [Rule.PROTOCOL]
    assert "no answer to DMA_READ" in probe.record.violations[0].text


def test_a_client_that_takes_a_byte_at_a_time_has_no_more_time_for_it(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One deadline holds for an access, and not for each of its 2,048 questions."""
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.4)
    client = Client(probe.path, max_data_xfer_size=1)
    assert client.ask(map_(0, 1)) == DmaMapReply()
    connection = client.link.connection
    setting = struct.pack("<QII", 0, 2048, 2)
    # Its own announcement forbids the client to write 16 bytes: as many writes.
    for at in range(len(setting)):
        write = RegionWrite(0, Register.ADDRESS + at, setting[at : at + 1])
        client.link.send(connection.request(write), 60)
    asked = 0
    with suppress(OSError):
        while (event := client.link.receive(60)) is not None:
            if isinstance(event, Request):
                asked += 1
                sleep(0.05)
                assert isinstance(event.message, DmaWrite)
                answer = DmaWriteReply(event.message.address, len(event.message.data))
                client.link.send(connection.reply(event, answer), 60)
    assert 1 < asked < 30
    assert rules(probe) == [Rule.PROTOCOL]


def test_requests_that_wait_take_no_memory(probe: Probe, client: Client) -> None:
    """While an answer is owed, 16 MiB of requests are kept and not a thousand of 1 MiB."""
    assert client.ask(map_(0, 1)) == DmaMapReply()
    connection = client.link.connection
    setting = struct.pack("<QII", 0, 8, 1)
    client.link.send(connection.request(RegionWrite(0, Register.ADDRESS, setting)), 60)
    with suppress(OSError):
        for _ in range(100):
            client.link.send(connection.request(UnknownRequest(99, bytes(1 << 20))), 60)
    probe.wait_for(lambda: probe.client is None)
    assert rules(probe) == [Rule.PROTOCOL]
    assert "16 requests" in probe.record.violations[0].text


def test_what_comes_before_the_answer_waits_for_its_turn(probe: Probe, client: Client) -> None:
    client.ask(map_(0, 1))
    setting = struct.pack("<QII", 0, 4, 1)
    connection = client.link.connection
    client.link.send(connection.request(RegionWrite(0, Register.ADDRESS, setting)), 60)
    client.link.send(connection.request(DmaUnmap(0, 0, P)), 60)
    question = client.link.receive(60)
    assert question is not None
    assert len(probe.windows) == 1
    client.link.send(connection.error(question, errno.EFAULT), 60)  # type: ignore[arg-type]
    assert [type(client.link.receive(60).message).__name__ for _ in range(2)] == [  # type: ignore[union-attr]
        "RegionWriteReply",
        "DmaUnmapReply",
    ]
    assert rules(probe) == [Rule.UNREACHABLE]


# -- the wire --------------------------------------------------------------------------------------


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send a message, and return the answer, without its payload."""
    sock.sendall(data)
    answer = sock.recv(16, socket.MSG_WAITALL)
    if answer:
        sock.recv(struct.unpack_from("=I", answer, 4)[0] - 16, socket.MSG_WAITALL)
    return answer


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=HHIII", 1, 2, 17, 0, 0) + b"x",
        struct.pack("=HHIII", 1, 4, 16, 0, 0),
        struct.pack("=HHIII", 1, 5, 48, 0, 0) + struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0),
        struct.pack("=HHIII", 1, 10, 34, 0, 0) + struct.pack("=QII", 0, 0, 1) + b"xy",
        struct.pack("=HHIII", 1, 11, 32, 0, 0) + struct.pack("=QQ", 0, 1),
        struct.pack("=HHIII", 1, 4, 16, 1, 0),  # an answer that nobody waits for
        struct.pack("=HHIII", 1, 4, 16, 2, 0),
        struct.pack("=HHI", 1, 1, 20) + VERSION[8:],
    ],
)
def test_messages_that_make_no_sense_get_einval(probe: Probe, data: bytes) -> None:
    """As from libvfio-user (lib/libvfio-user.c, get_request(), handle_request())."""
    with raw(probe) as sock:
        assert len(exchange(sock, VERSION)) == 16
        refusal = struct.pack("=HHIII", 1, data[2], 16, 0x21, errno.EINVAL)
        assert exchange(sock, data) == refusal
        assert exchange(sock, struct.pack("=HHIII", 2, 13, 16, 0, 0))[8:] == bytes([1] + 7 * [0])
    assert rules(probe) == [Rule.MESSAGE]


def test_what_spdk_sends(probe: Probe, client: Client, ram: int) -> None:
    """
    More bytes, and a descriptor with DMA_UNMAP.

    SPDK: lib/vfio_user/host/vfio_user.c, vfio_user_get_dev_region_info(),
    vfio_user_dev_dma_map_unmap(), vfio_user_check_version().
    """
    with raw(probe) as sock:
        # It waits until the client before it has left.
        client.link.close()
        version = struct.pack("=HHIII", 0, 1, 20, 0, 0) + struct.pack("=HH", 0, 0)
        assert exchange(sock, version)[8:12] == b"\1\0\0\0"
        region = struct.pack("=IIIIQQ", 4064, 0, 7, 0, 0, 0) + bytes(4032)
        assert exchange(sock, struct.pack("=HHIII", 0, 5, 4080, 0, 0) + region)[8] == 1
        for command, payload in (
            (2, struct.pack("=IIQQQ", 32, 3, 0, 0, P)),
            (3, struct.pack("=IIQQ", 24, 0, 0, P)),
        ):
            header = struct.pack("=HHIII", 0, command, 16 + len(payload), 0, 0)
            socket.send_fds(sock, [header + payload], [ram])
            assert exchange(sock, b"")[8] == 1
    probe.wait_for(lambda: probe.client is None)
    assert probe.record.clean
    assert probe.record.noted == {Oddity.LONG_PAYLOAD: 1, Oddity.DESCRIPTORS: 1}
    assert probe.record.first_noted[Oddity.LONG_PAYLOAD] == (
        "client2: DEVICE_GET_REGION_INFO, 0xfe0 bytes, expected 0x20"
    )


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=HHIII", 0, 4, 32, 0, 0) + bytes(16),
        struct.pack("=HHIII", 0, 1, 20, 0, 0) + struct.pack("=HH", 3, 0),
        struct.pack("=HHIII", 0, 1, 21, 0, 0) + struct.pack("=HHB", 0, 0, 7),
        *(
            struct.pack("=HHIII", 0, 1, 20 + len(text) + 1, 0, 0) + bytes(4) + text + b"\0"
            for text in (
                b'{"capabilities": {"max_data_xfer_size": 0}}',
                b'{"capabilities": {"pgsizes": 0}}',
                b'{"capabilities": {"twin_socket": 7}}',
            )
        ),
    ],
)
def test_first_messages_that_are_refused(probe: Probe, data: bytes) -> None:
    """libvfio-user answers, and closes: lib/tran.c, recv_version(); lib/tran_sock.c."""
    with raw(probe) as sock:
        answer = exchange(sock, data)
        assert answer[8:] == struct.pack("=II", 0x21, errno.EINVAL)
        assert sock.recv(1) == b""
    probe.wait_for(lambda: probe.client is None)
    assert rules(probe) == [Rule.MESSAGE]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        VERSION[:7],
        VERSION + struct.pack("=HHIII", 1, 2, 0, 0, 0),
        VERSION + struct.pack("=HHIII", 1, 2, 0xFFFF_FFFF, 0, 0),
    ],
)
def test_bytes_that_are_no_message_end_the_connection(probe: Probe, data: bytes) -> None:
    with raw(probe) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        # Reset: the probe has closed without reading all of it.
        with suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    probe.wait_for(lambda: probe.client is None)
    assert rules(probe) == [Rule.PROTOCOL]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no VERSION within"),
        (VERSION[:3], "the rest of a message did not come"),
        (VERSION + VERSION[:3], "the rest of a message did not come"),
    ],
)
def test_half_a_message_and_silence_hold_up_nobody(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, data: bytes, why: str
) -> None:
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.3)
    with raw(probe) as sock:
        sock.sendall(data)
        probe.wait_for(lambda: probe.client is not None)
        with pytest.raises(IommuFault):
            probe.read(0, 8)
        # The next one is served, though the first has not gone.
        served(probe)
    assert rules(probe) == [Rule.PROTOCOL]
    assert why in probe.record.violations[0].text


def test_a_client_that_has_nothing_to_say_stays(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.1)
    client = Client(probe.path)
    sleep(0.4)
    assert client.ask(GetDeviceInfo()) is not None
    client.link.close()
    assert probe.record.clean


def test_an_error_of_the_sessions_own_ends_the_session(
    probe: Probe, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is: there is no list of the classes that are survived."""

    class OddError(Exception):
        pass

    def fail(*_: object) -> None:
        raise OddError("just so")

    monkeypatch.setattr(ProbeDevice, "carry_out", fail)
    client.link.send(client.link.connection.request(GetDeviceInfo()), 60)
    assert client.link.receive(60) is None
    monkeypatch.undo()
    assert rules(probe) == [Rule.PROTOCOL]
    assert "OddError('just so')" in probe.record.violations[0].text
    assert "the session fails" in caplog.text


def test_no_descriptor_is_left_to_accept_with(probe: Probe) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # The limit is in numbers: none is free below this one.
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            sock.connect(str(probe.path))
            sleep(0.3)
            assert probe.error is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert exchange(sock, VERSION)[8] == 1


def test_a_name_that_is_no_utf_8(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    fd = os.memfd_create(os.fsdecode(b"ram\xff\x1b[31m"), os.MFD_CLOEXEC)
    os.ftruncate(fd, P)
    with TraceWriter(file) as trace, Probe(path, trace=(trace,)) as probe:
        client = Client(path)
        assert client.ask(map_(0, 2), fd) == errno.EINVAL
        assert client.ask(map_(0, 1), fd) == DmaMapReply()
        client.link.close()
        probe.wait_for(lambda: probe.client is None)
    assert probe.error is None
    assert rules(probe) == [Rule.BEYOND_FILE]
    assert len([json.loads(line) for line in file.read_bytes().splitlines()]) == 5
    os.close(fd)


def test_descriptors_that_belong_nowhere(probe: Probe, ram: int) -> None:
    with raw(probe) as sock:
        rights = array("i", [ram] * 250)
        sock.sendmsg([VERSION], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert exchange(sock, b"")[8] == 1
    probe.wait_for(lambda: probe.client is None)
    assert probe.record.clean
    assert probe.record.noted == {Oddity.DESCRIPTORS: 1}


def test_a_client_that_never_reads(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_TIMEOUT_SECONDS", 0.2)
    with raw(probe) as sock:
        sock.sendall(VERSION)
        question = struct.pack("=HHIII", 1, 9, 32, 0, 0) + struct.pack("=QII", 0, 0, 4096)
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                sock.sendall(question)
    probe.wait_for(lambda: probe.client is None)
    assert rules(probe) == [Rule.PROTOCOL]
    assert "does not read" in probe.record.violations[0].text


def test_a_client_that_vanishes_leaves_nothing(probe: Probe, ram: int) -> None:
    client = Client(probe.path)
    client.ask(map_(0, 4), ram)
    client.link.close()
    probe.wait_for(lambda: probe.client is None)
    assert probe.windows == []
    assert probe.record.clean


MESSAGES = (
    map_(0, 1),
    map_(P, 2),
    map_(0, 1 << 40),
    DmaUnmap(0, 0, P),
    DmaUnmap(0, 0, 8 * P),
    DmaUnmap(2, 0, 0),
    GetDeviceInfo(),
    Reset(),
    RegionWrite(7, 4, b"\xff\xff"),
    RegionWrite(0, Register.ADDRESS, struct.pack("<QII", 0, 64, 1)),
    RegionWrite(0, Register.ADDRESS, struct.pack("<QII", P, 64, 2)),
    UnknownRequest(77, b"?"),
)


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    with Probe(tmp_path_factory.mktemp("probe") / "p.sock", touch=True) as probe:
        yield probe
        served(probe)
    assert probe.error is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    todo=st.lists(st.tuples(st.sampled_from(MESSAGES), st.booleans()), max_size=12),
    junk=st.binary(max_size=200),
)
def test_any_client(
    long_lived: Probe, ram: int, todo: list[tuple[Message, bool]], junk: bytes
) -> None:
    probe = long_lived
    client = Client(probe.path)
    for message, with_memory in todo:
        fds = (ram,) if with_memory and isinstance(message, DmaMap) else ()
        if isinstance(message, RegionWrite) and any(w.file is None for w in probe.windows):
            continue  # it would ask us
        client.ask(message, *fds)
    with socket.socket(fileno=os.dup(client.link.fileno())) as sock, suppress(OSError):
        sock.sendall(junk)
    client.link.close()
    probe.wait_for(lambda: probe.client is None)
    assert probe.error is None


# -- the socket ------------------------------------------------------------------------------------


def test_the_socket_of_a_dead_probe_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with Probe(path) as probe:
        served(probe)


def test_what_is_somebody_elses_is_left_alone(probe: Probe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="somebody listens"):
        Probe(probe.path)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is no socket"):
        Probe(file)
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match="too long for a socket"):
        Probe(tmp_path / ("x" * 200))
    with pytest.raises(FileNotFoundError):
        Probe(tmp_path / "no" / "folder")


def test_the_socket_is_there_only_when_one_can_connect(tmp_path: Path) -> None:
    """Whoever waits for the file may connect at once."""
    path = tmp_path / "probe.sock"
    refused: list[OSError] = []
    stop = threading.Event()

    def connect_when_there() -> None:
        while not stop.is_set():
            if path.exists():
                with socket.socket(socket.AF_UNIX) as sock:
                    try:
                        sock.connect(str(path))
                    except FileNotFoundError:
                        continue  # it has gone meanwhile
                    except ConnectionRefusedError as error:
                        refused.append(error)

    thread = threading.Thread(target=connect_when_there)
    thread.start()
    try:
        for _ in range(50):
            listener = server_module._listen(path)
            # The other way round: a file without its listener would refuse too.
            path.unlink()
            listener.close()
    finally:
        stop.set()
        thread.join()
    assert refused == []
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_no_room_for_another_name(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * (103 - len(os.fsencode(tmp_path))))
    folder.mkdir()
    path = folder / "s"
    assert 104 <= len(os.fsencode(path)) <= 107
    with server_module._listen(path), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def test_one_after_the_other(probe: Probe, ram: int) -> None:
    first = Client(probe.path)
    first.ask(map_(0, 1), ram)
    seen: list[str | None] = []

    def second() -> None:
        target = VfioUserTarget(probe.path, timeout=60)
        seen.append(probe.client)
        target.close()

    thread = threading.Thread(target=second)
    thread.start()
    assert first.ask(GetDeviceInfo()) is not None
    assert probe.client == "client1"
    first.link.close()
    thread.join()
    assert seen == ["client2"]


def test_stopping_lets_go_of_a_client(path: Path) -> None:
    with RamBlock.create("ram", P) as block:
        with Probe(path) as probe:
            target = VfioUserTarget(path)
            target.map(0, HostRange(block.fd, 0, block.address, P))
        probe.stop()
        assert probe.windows == []
        with suppress(OSError):
            target.close()
