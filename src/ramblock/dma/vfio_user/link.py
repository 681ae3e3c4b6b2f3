# SPDX-License-Identifier: Apache-2.0
"""
A connection on its socket: UNIX stream sockets, with descriptors as SCM_RIGHTS.

It reads exactly up to the end of a header and then of a message, so that descriptors arrive with
bytes of the one message that they belong to (:mod:`ramblock.dma.vfio_user.inbox`). It sends the
descriptors of a message with its first byte, and never bytes of two messages in one call.
"""

from __future__ import annotations

import os
import select
import socket
from array import array
from collections import deque
from time import monotonic

from ramblock.dma.vfio_user.capabilities import Capabilities
from ramblock.dma.vfio_user.connection import OWN_CAPABILITIES, Connection, Role
from ramblock.dma.vfio_user.events import CLOSED, NEED_DATA, Event, Outgoing, Reply, Request
from ramblock.dma.vfio_user.numbers import KERNEL_MAX_FDS
from ramblock.process import ClosedAtEnd

__all__ = ["Link", "connect"]

# Enough for all descriptors that the kernel passes at once: it closes those that do not fit.
_ANCILLARY_BYTES = socket.CMSG_SPACE(KERNEL_MAX_FDS * array("i").itemsize)
# Bytes to read at once; a larger message takes several calls.
_CHUNK = 1 << 18


class Link(ClosedAtEnd):
    """
    One side of a connection with its socket. Not for several threads at once.

    The calls named *now* never wait. An exception that is no ``TimeoutError`` leaves the link
    closed.

    :param sock: A connected UNIX stream socket; the link's from now on.
    :param role: Which side this is.
    :param capabilities: This side's announcement, and so its limits.
    :param peer: The peer's, where this is the twin of a link that is negotiated.
    """

    def __init__(
        self,
        sock: socket.socket,
        role: Role,
        capabilities: Capabilities = OWN_CAPABILITIES,
        peer: Capabilities | None = None,
    ) -> None:
        sock.settimeout(0)
        self.connection = Connection(role, os.close, capabilities, peer)
        self._sock = sock
        # The message at the front may be sent in part: its rest then, without descriptors.
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        #: How many bytes wait to be sent.
        self.unsent = 0

    def fileno(self) -> int:
        """Tell the socket's descriptor, for polling; -1: the link is closed."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._sock.fileno() < 0

    def close(self) -> None:
        """
        Close the socket, and every descriptor that no event has claimed.

        Nothing happens the second time.
        """
        self._outbox.clear()
        self.unsent = 0
        self.connection.close()
        self._sock.close()

    def twin(self, sock: socket.socket) -> Link:
        """Make the link for the server's commands, beside this one, which is negotiated."""
        connection = self.connection
        return Link(sock, connection.role, connection.own, connection.peer)

    # -- now ---------------------------------------------------------------------------------------

    def queue(self, outgoing: Outgoing) -> None:
        """
        Put a message behind those that wait to be sent.

        Its descriptors have to stay open until then.
        """
        self._outbox.append((memoryview(outgoing.data), outgoing.fds))
        self.unsent += len(outgoing.data)

    def flush(self) -> bool:
        """
        Send now as much as the socket takes.

        :return: Whether nothing waits any more.
        :raises OSError: The peer is gone.
        """
        try:
            while self._outbox:
                data, fds = self._outbox[0]
                done = self._sock.sendmsg([data], _rights(fds), socket.MSG_NOSIGNAL)
                self.unsent -= done
                if done == len(data):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = data[done:], ()
        except BlockingIOError:
            return False
        except BaseException:
            self.close()
            raise
        return True

    def event(self) -> Event:
        """
        Return now an event that has arrived; ``NEED_DATA``: no whole message yet.

        :raises RemoteProtocolError: The peer broke the protocol.
        :raises OSError: The socket failed.
        """
        try:
            while (event := self.connection.next_event()) is NEED_DATA:
                if not self._read():
                    break
        except BaseException:
            self.close()
            raise
        return event

    def _read(self) -> bool:
        """
        Hand the connection the socket's bytes, up to the end of its message.

        False: nothing.
        """
        size = min(self.connection.wanted, _CHUNK)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # The peer closed with something of ours unread.
            self.connection.receive_eof()
            return True
        numbers = _descriptors(ancillary)
        self.connection.receive(data, numbers)
        if flags & socket.MSG_CTRUNC:
            # Either more than the kernel passes, or this process may not have that many.
            self.connection.reject(f"of its descriptors only {len(numbers)} could be received")
        elif not data:
            self.connection.receive_eof()
        return True

    # -- with patience -----------------------------------------------------------------------------

    def send(self, outgoing: Outgoing, timeout: float | None = None) -> None:
        """
        Send a message, and all that waits before it.

        :param timeout: In seconds; None: as long as it takes.
        :raises TimeoutError: The peer does not read. Unsent bytes stay queued.
        :raises OSError: The peer is gone.
        """
        deadline = None if timeout is None else monotonic() + timeout
        self.queue(outgoing)
        while not self.flush():
            self._wait(select.POLLOUT, deadline, "send")

    def receive(self, timeout: float | None = None) -> Request | Reply | None:
        """
        Wait for the next message; meanwhile send the queue.

        :param timeout: In seconds, for the whole message; None: as long as it takes.
        :return: The message; None: the peer has closed its side.
        :raises TimeoutError: There is no whole message yet.
        :raises RemoteProtocolError: The peer broke the protocol.
        :raises OSError: The socket failed.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while (event := self.event()) is NEED_DATA:
            sent = self.flush()
            self._wait(
                select.POLLIN if sent else select.POLLIN | select.POLLOUT, deadline, "receive"
            )
        return None if event is CLOSED else event

    def _wait(self, events: int, deadline: float | None, what: str) -> None:
        poller = select.poll()
        poller.register(self._sock, events)
        try:
            left = None if deadline is None else max(0.0, deadline - monotonic()) * 1000
            ready = poller.poll(left)
        except BaseException:
            self.close()
            raise
        if not ready:
            raise TimeoutError(f"{what}: the peer did not do its part in time")


def connect(path: str | os.PathLike[str], timeout: float | None = None) -> socket.socket:
    """
    Connect to the server that listens at *path*.

    :raises OSError: Nobody listens there, or does not accept in time. Nothing is held.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _rights(fds: tuple[int, ...]) -> list[tuple[int, int, array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> array[int]:
    numbers = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return numbers
