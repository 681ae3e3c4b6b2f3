"""
Whole sessions of peers that send what they like, made from a seed: a client against the probe, and
a server against the client.

Most messages are right but for one thing, so that the code behind the reader is reached. Both play
to their end whatever the other side does; the callers look at the survivor. The tests play a few
hundred, ``fuzz/sessions.py`` a million messages.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from random import Random

from ramblock.dma import HostRange, VfioUserTarget
from ramblock.errors import DmaError, RemoteProtocolError

__all__ = ["Files", "play_client", "play_server"]

P = 4096
_HEADER = struct.Struct("=HHIII")
_VERSION, _DMA_READ, _DMA_WRITE = 1, 11, 12
_NUMBERS = (0, 1, 2, 4, 15, 16, 24, 32, P, 2 * P, 1 << 20, 1 << 31, (1 << 32) - 1)
_LONGS = (*_NUMBERS, 1 << 32, 1 << 63, (1 << 64) - P, (1 << 64) - 1)
_PATIENCE_SECONDS = 5.0


class Files:
    """Descriptors of several kinds to be sent; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.numbers: list[int] = []

    def __enter__(self) -> Files:
        for size in (16 * P, 16 * P, P, 0):
            self._add(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(self.numbers[-1], size)
        fcntl.fcntl(self.numbers[1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        # Not UTF-8, and a command for a terminal.
        self._add(os.memfd_create(os.fsdecode(b"\xff\xfe\x1b[2J\n"), os.MFD_CLOEXEC))
        self._add(os.open(f"/proc/self/fd/{self.numbers[0]}", os.O_RDONLY | os.O_CLOEXEC))
        self._add(os.open("/proc/self/exe", os.O_PATH | os.O_CLOEXEC))
        for number in os.pipe2(os.O_CLOEXEC):
            self._add(number)
        return self

    def _add(self, number: int) -> None:
        self.numbers.append(number)
        self._stack.callback(os.close, number)

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _message(
    command: int, payload: bytes, message_id: int, flags: int = 0, number: int = 0
) -> bytes:
    return _HEADER.pack(message_id, command, _HEADER.size + len(payload), flags, number) + payload


def _right(random: Random) -> tuple[int, bytes]:
    """Make a command as a client sends it, with command and payload."""
    page = random.randrange(16) * P
    size = random.choice((P, P, 2 * P, 16 * P))
    match random.randrange(12):
        case 0 | 1 | 2:
            flags = random.choice((3, 3, 3, 1, 7, 11))
            return 2, struct.pack("=IIQQQ", 32, flags, random.choice((0, P)), page, size)
        case 3 | 4:
            return 3, struct.pack("=IIQQ", 24, 0, page, size)
        case 5:
            return 3, struct.pack("=IIQQ", 24, 2, 0, 0)
        case 6 | 7:
            # The engine: address, length, command.
            setting = struct.pack("<QII", page + random.randrange(P), random.randrange(99), 1)
            if random.random() < 0.5:
                setting = setting[:12] + struct.pack("<I", 2)
            return 10, struct.pack("=QII", 8, 0, len(setting)) + setting
        case 8:
            return 9, struct.pack("=QII", random.randrange(250), random.choice((0, 7)), 4)
        case 9:
            return 8, struct.pack("=IIIII", 20, random.randrange(128), random.randrange(6), 0, 1)
        case 10:
            return random.choice(((4, bytes([16]) + bytes(15)), (13, b"")))
    return random.choice((5, 6, 7)), struct.pack("=IIIIQQ", 64, 0, random.randrange(10), 0, 0, 0)


def _hostile(random: Random, message_id: int) -> bytes:
    """Make a message with something wrong, or nothing."""
    command, payload = _right(random)
    flags = number = 0
    match random.randrange(14):
        case 0:
            payload = payload[: random.randrange(len(payload) + 1)]
        case 1:
            payload += random.randbytes(random.choice((1, 8, 4032)))
        case 2 | 3 if len(payload) >= 4:
            start = random.randrange(0, len(payload) - 3, 4)
            wrong = struct.pack("=I", random.choice(_NUMBERS))
            payload = payload[:start] + wrong + payload[start + 4 :]
        case 4 if len(payload) >= 16:
            start = random.randrange(8, len(payload) - 7, 8)
            wrong = struct.pack("=Q", random.choice(_LONGS))
            payload = payload[:start] + wrong + payload[start + 8 :]
        case 5:
            command = random.choice((0, 1, 11, 12, 14, 15, 16, 17, 18, 19, 999))
        case 6:
            flags = random.choice((1, 2, 0xF, 0x10, 0x20, 0x21, 0x40, 0xFFFF_FFF0))
            number = random.choice(_NUMBERS)
        case 7:
            payload = random.randbytes(random.randrange(64))
    return _message(command, payload, message_id, flags, number)


def _version(random: Random) -> bytes:
    capabilities: dict[str, object] = {
        "max_msg_fds": random.choice((8, 8, 0, 1)),
        "max_data_xfer_size": random.choice((1 << 20, 1 << 20, 1, 3)),
        "twin_socket": {"supported": random.random() < 0.5},
    }
    if random.random() < 0.1:
        name = random.choice((*capabilities, "pgsizes", "max_dma_maps", "write_multiple"))
        capabilities[name] = random.choice((0, -1, 1.5, None, [], {}, "8", True, 1 << 70))
    major = random.choice((0,) * 20 + (1, 65535))
    text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    if random.random() < 0.03:
        text = text[: random.randrange(len(text))]
    return struct.pack("=HH", major, random.randrange(3)) + text


class _Side:
    """One hostile side: sends messages, and answers some of the other's."""

    def __init__(self, sock: socket.socket, random: Random, files: Files) -> None:
        self.random = random
        self.files = files
        self.main = sock
        self.socks = [sock]
        self._data: dict[socket.socket, bytes] = {sock: b""}
        self.sent = 0
        self.over = False

    def close(self) -> None:
        for sock in self.socks:
            sock.close()

    def send(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        self.sent += 1
        while data and not self.over:
            size = len(data)
            if self.random.random() < 0.05:
                size = self.random.randrange(1, size + 1)
            try:
                done = socket.send_fds(sock, [data[:size]], fds, socket.MSG_DONTWAIT)
                data, fds = data[done:], []
            except BlockingIOError:
                self.read(_PATIENCE_SECONDS)
            except OSError:
                self.over = True

    def some_fds(self) -> list[int]:
        if self.random.random() < 0.3:
            return []
        count = self.random.choice((1, 1, 1, 1, 1, 2, 9))
        return self.random.choices(self.files.numbers, (9, 1, 1, 1, 1, 1, 1, 1, 1), k=count)

    def read(self, seconds: float) -> None:
        """Read what is there, waiting for the first of it, and deal with the messages."""
        ready, _, _ = select.select(self.socks, [], [], seconds)
        if seconds and not ready:
            self.over = True  # the other side neither reads nor writes
        for sock in ready:
            try:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                self.over = True
                return
            if not data:
                self.over = True
            self._data[sock] += data
            self.take_fds(fds)
            self._deal_with_messages(sock)

    def take_fds(self, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    def add(self, sock: socket.socket) -> None:
        self.socks.append(sock)
        self._data[sock] = b""

    def _deal_with_messages(self, sock: socket.socket) -> None:
        while len(data := self._data[sock]) >= _HEADER.size:
            header = _HEADER.unpack_from(data)
            if len(data) < header[2]:
                return
            self._data[sock] = data[header[2] :]
            self.deal_with(sock, header, data[_HEADER.size : header[2]])

    def deal_with(self, sock: socket.socket, header: tuple[int, ...], payload: bytes) -> None:
        raise NotImplementedError


class _HostileClient(_Side):
    def take_fds(self, fds: list[int]) -> None:
        # The only one that the probe sends.
        for fd in fds:
            self.add(socket.socket(fileno=fd))

    def deal_with(self, sock: socket.socket, header: tuple[int, ...], payload: bytes) -> None:
        message_id, command, _, flags, _ = header
        if flags & 1 or command not in (_DMA_READ, _DMA_WRITE):
            return
        _, count = struct.unpack_from("=QQ", payload)
        answer = payload[:16] + (self.random.randbytes(count) if command == _DMA_READ else b"")
        match self.random.randrange(12):
            case 0:
                self.send(sock, _message(command, answer[:-1], message_id, 1), [])
            case 1:
                self.send(sock, _message(command, answer + b"x", message_id, 1), self.some_fds())
            case 2:
                self.send(sock, _message(command, answer, message_id ^ 1, 1), [])
            case 3:
                self.send(sock, _message(command ^ 7, answer, message_id, 1), [])
            case 4:
                number = self.random.choice(_NUMBERS)
                self.send(sock, _message(command, b"", message_id, 0x21, number), [])
            case 5:
                self.send(sock, _message(command, answer, message_id, 1), [])
                self.send(sock, _message(command, answer, message_id, 1), [])
            case 6:
                self.send(sock, _message(2, answer, message_id), [])
            case _:
                self.send(sock, _message(command, answer, message_id, 1), [])


def play_client(path: str | os.PathLike[str], seed: int, files: Files) -> int:
    """Play a client of the probe at *path*; return the number of messages."""
    random = Random(seed)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(os.fspath(path))
        side = _HostileClient(sock, random, files)
        try:
            if random.random() < 0.97:
                fds = side.some_fds() if random.random() < 0.1 else []
                side.send(sock, _message(_VERSION, _version(random), 0), fds)
            for number in range(random.randrange(400)):
                if side.over:
                    break
                target = random.choice(side.socks) if random.random() < 0.02 else sock
                side.send(target, _hostile(random, number & 0xFFFF), side.some_fds())
                if random.random() < 0.3:
                    side.read(0)
            if random.random() < 0.2 and not side.over:
                side.send(sock, random.randbytes(random.randrange(1, 64)), [])
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            while not side.over:
                side.read(_PATIENCE_SECONDS)
        finally:
            side.close()
    return side.sent


class _HostileServer(_Side):
    def __init__(self, sock: socket.socket, random: Random, files: Files) -> None:
        super().__init__(sock, random, files)
        # How much of it is wrong; some are well-behaved for long.
        self._badness = random.choice((0.0, 0.01, 0.05, 0.3))

    def deal_with(self, sock: socket.socket, header: tuple[int, ...], payload: bytes) -> None:
        message_id, command, _, flags, _ = header
        if flags & 1:
            return
        if command == _VERSION:
            self._negotiate(message_id)
            return
        answer = b""
        match command:
            case 3:
                answer = payload if self.random.random() < 0.9 else b""
            case 4:
                answer = struct.pack("=IIII", 16, 3, 9, 5)
            case 9:
                answer = payload[:16] + bytes(struct.unpack_from("=I", payload, 12)[0])
            case 10:
                answer = payload[:16]
        if self.random.random() < 0.3:
            self._ask()
        flags, number = 1, 0
        if self.random.random() < 0.1:
            flags, number = 0x21, self.random.choice((0, 5, 22, 5000))
        if self.random.random() < self._badness:
            match self.random.randrange(7):
                case 0:
                    answer = answer[: self.random.randrange(len(answer) + 1)]
                case 1:
                    answer += self.random.randbytes(9)
                case 2:
                    message_id ^= 1
                case 3:
                    command ^= 1
                case 4:
                    flags = self.random.choice((0, 2, 0x41, 0x11))
                case 5:
                    self.send(sock, _message(command, answer, message_id, flags, number), [])
                case 6:
                    self.over = True
                    return
        fds = self.some_fds() if self.random.random() < self._badness else []
        self.send(sock, _message(command, answer, message_id, flags, number), fds)

    def _ask(self) -> None:
        """Send a command of a server's, or something like one."""
        random = self.random
        sock = random.choice(self.socks)
        address, count = random.randrange(16) * P, random.choice((1, 64, P, 0, 2 * P))
        match random.randrange(6):
            case 0 | 1:
                self.send(sock, _message(11, struct.pack("=QQ", address, count), 9), [])
            case 2 | 3:
                data = struct.pack("=QQ", address, count) + bytes(count)
                self.send(sock, _message(12, data, 9), [])
            case 4:
                self.send(sock, _hostile(random, 9), [])
            case 5:
                payload = struct.pack("=QQ", random.choice(_LONGS), random.choice(_LONGS))
                self.send(sock, _message(11, payload, 9), [])

    def _negotiate(self, message_id: int) -> None:
        capabilities: dict[str, object] = {"max_msg_fds": self.random.choice((8, 0))}
        fds: list[int] = []
        if self.random.random() < 0.5:
            ours, theirs = socket.socketpair()
            self.add(ours)
            capabilities["twin_socket"] = {"supported": True, "fd_index": 0}
            fds = [theirs.detach()]
        text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        self.send(self.main, _message(_VERSION, bytes(4) + text, message_id, 1), fds)
        for fd in fds:
            os.close(fd)


@contextmanager
def _quiet() -> Iterator[None]:
    with suppress(DmaError):
        yield


def play_server(sock: socket.socket, seed: int, files: Files) -> int:
    """Play a server on *sock* until the client has gone; return the number of messages."""
    side = _HostileServer(sock, Random(seed), files)
    try:
        while not side.over:
            side.read(60)
    finally:
        side.close()
    return side.sent


def use_target(sock: socket.socket, seed: int, memory: HostRange) -> VfioUserTarget | None:
    """
    Use a target on *sock* as a VMM does; each call ends with an answer or a ``DmaError``.

    Return it closed; None: the server was refused.
    """
    random = Random(seed)
    try:
        target = VfioUserTarget(sock, timeout=0.3)
    except (DmaError, RemoteProtocolError):
        return None
    for _ in range(random.randrange(200)):
        if target.failure is not None:
            break
        iova = random.randrange(16) * P
        with _quiet():
            match random.randrange(6):
                case 0 | 1:
                    target.map(iova, memory, writable=random.random() < 0.5)
                case 2 | 3:
                    target.unmap(iova, P)
                case 4:
                    target.region_write(0, 0, b"go")
                case 5:
                    target.region_read(0, 0, 4)
    with _quiet():
        target.close()
    return target
