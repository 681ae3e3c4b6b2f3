"""
A vfio-user server that does DMA by message as libvfio-user does it: it sends a command and takes
the next message on that socket for the answer.

From lib/tran_sock.c, tran_sock_msg_iovec() with tran_sock_recv_fds() (EPROTO for another id, EINVAL
for a command), lib/tran.c, tran_negotiate() (the socket of its own, if the client takes it), and
lib/libvfio-user.c, vfu_dma_transfer(). A write to region 0 makes the device read and write each of
its windows, before it answers. Nothing is shared with the package but the layout of the messages,
which is written down here once more.
"""

from __future__ import annotations

import errno
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable

__all__ = ["SynchronousServer"]

_HEADER = struct.Struct("=HHIII")
_REPLY, _ERROR = 1, 0x20
_VERSION, _DMA_READ, _DMA_WRITE = 1, 11, 12
_DMA_BYTES = 64


class SynchronousServer:
    """
    :param sock: Its end.
    :param twin: Whether it has a socket for its own commands, where the client takes one.
    :param before_answer: Called while a region access is unanswered, before its DMA.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        twin: bool,
        before_answer: Callable[[], object] = lambda: None,
    ) -> None:
        self._sock = sock
        self._own: socket.socket | None = None
        self._twin = twin
        self._before_answer = before_answer
        self.windows: dict[int, int] = {}
        self.accesses = 0
        #: The errno of an access that went wrong: the connection is of no use then.
        self.error: OSError | None = None
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (message := _receive(self._sock)) is not None:
                self._serve(*message)
        except OSError as error:
            self.error = error
        finally:
            self._sock.close()
            if self._own is not None:
                self._own.close()

    def _serve(self, header: tuple[int, ...], payload: bytes) -> None:
        message_id, command, _, flags, _ = header
        if flags & 0xF:
            raise OSError(errno.EINVAL, "not a command")
        number = 0
        answer = b""
        match command:
            case 1:  # VERSION
                self._negotiate(message_id, payload)
                return
            case 2:  # DMA_MAP
                address, size = struct.unpack_from("=QQ", payload, 16)
                self.windows[address] = size
            case 3:  # DMA_UNMAP
                address, size = struct.unpack_from("=QQ", payload, 8)
                if self.windows.get(address) == size:
                    del self.windows[address]
                    answer = payload
                else:
                    number = errno.ENOENT
            case 9:  # REGION_READ
                (count,) = struct.unpack_from("=I", payload, 12)
                answer = payload + bytes(count)
                self._run_device()
            case 10:  # REGION_WRITE
                answer = payload[:16]
                self._run_device()
            case 13:  # DEVICE_RESET
                self._run_device()
            case _:
                number = errno.EINVAL
        _send(self._sock, message_id, command, answer, _REPLY | (_ERROR if number else 0), number)

    def _negotiate(self, message_id: int, payload: bytes) -> None:
        offered = json.loads(payload[4:-1])["capabilities"].get("twin_socket", {})
        # No descriptors are taken, so that all DMA is by message.
        capabilities: dict[str, object] = {"max_msg_fds": 0, "max_data_xfer_size": 1 << 20}
        fds: list[int] = []
        theirs = None
        if self._twin and offered.get("supported"):
            self._own, theirs = socket.socketpair()
            fds = [theirs.fileno()]
            capabilities["twin_socket"] = {"supported": True, "fd_index": 0}
        data = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        _send(self._sock, message_id, _VERSION, bytes(4) + data, _REPLY, fds=fds)
        if theirs is not None:
            theirs.close()

    def _run_device(self) -> None:
        self._before_answer()
        for address in list(self.windows):
            data = self._ask(_DMA_READ, struct.pack("=QQ", address, _DMA_BYTES))[16:]
            self._ask(_DMA_WRITE, struct.pack("=QQ", address, _DMA_BYTES) + data[::-1])
            self.accesses += 2

    def _ask(self, command: int, payload: bytes) -> bytes:
        sock = self._own or self._sock
        message_id = next(self._ids) & 0xFFFF
        _send(sock, message_id, command, payload, 0)
        message = _receive(sock)
        if message is None:
            raise OSError(errno.ENOMSG, "the client is gone")
        header, answer = message
        if header[0] != message_id:
            raise OSError(errno.EPROTO, f"id {header[0]}, expected {message_id}")
        if header[3] & 0xF != _REPLY:
            raise OSError(errno.EINVAL, f"command {header[1]} instead of an answer")
        if header[3] & _ERROR:
            raise OSError(header[4], "the client refuses")
        return answer


def _receive(sock: socket.socket) -> tuple[tuple[int, ...], bytes] | None:
    data = sock.recv(_HEADER.size, socket.MSG_WAITALL)
    if len(data) < _HEADER.size:
        return None
    header = _HEADER.unpack(data)
    size = header[2] - _HEADER.size
    return header, sock.recv(size, socket.MSG_WAITALL) if size else b""


def _send(
    sock: socket.socket,
    message_id: int,
    command: int,
    payload: bytes,
    flags: int,
    number: int = 0,
    fds: list[int] | None = None,
) -> None:
    header = _HEADER.pack(message_id, command, _HEADER.size + len(payload), flags, number)
    socket.send_fds(sock, [header + payload], fds or [])
