# SPDX-License-Identifier: Apache-2.0
"""
The client's thread that talks to the server.

It alone touches the socket, the connection and the table of windows. Other threads hand it calls
and wait. So the server's DMA is served at any time, also while somebody waits for an answer;
Ctrl-C, which hits the main thread, leaves no message half sent; and a peer that floods one side
cannot block the other.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections import deque
from contextlib import suppress
from threading import Lock, Thread, current_thread

from ramblock.dma.vfio_user.calls import Call
from ramblock.dma.vfio_user.events import CLOSED, NEED_DATA, Reply, Request
from ramblock.dma.vfio_user.link import Link
from ramblock.dma.vfio_user.replies import ErrorReply
from ramblock.dma.vfio_user.serving import ServedMemory
from ramblock.errors import BusyError, DmaError, LocalProtocolError, ProtocolError

__all__ = ["Conversation"]

_log = logging.getLogger(__name__)


class Conversation:
    """
    A negotiated link, and the thread on it.

    :param link: The conversation's from now on.
    :param memory: Memory that the server may reach.
    :param twin: The link for the server's commands, if they have their own; likewise.
    """

    def __init__(self, link: Link, memory: ServedMemory, twin: Link | None = None) -> None:
        self._link = link
        # The server's commands first: its answer on the other link may mean that they are over.
        self._links = [link] if twin is None else [twin, link]
        self._memory = memory
        # The call that the device may do DMA for. libvfio-user takes the next message for the
        # answer to its DMA_READ (lib/tran_sock.c, tran_sock_msg_iovec()), so without a twin nothing
        # is sent meanwhile.
        self._running: Call | None = None
        #: Why it cannot go on; None: it can, or it was closed.
        self.failure: Exception | None = None
        self._closed = False
        self._over = False
        self._calls: deque[Call] = deque()
        self._sent: dict[int, Call] = {}
        # A server that reads no answers is not listened to either, or they would pile up.
        self._unsent_limit = link.connection.max_message_size
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # So that nobody rings a closed number, which is another's by then.
        self._ringing = Lock()
        self._poller = select.poll()
        self._poller.register(self._bell, select.POLLIN)
        self._thread = Thread(target=self._run, name="vfio-user", daemon=True)
        self._thread.start()

    # -- other threads -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed from this side."""
        return self._closed

    def carry_out(self, call: Call, timeout: float) -> None:
        """
        Have *call* sent and answered, and wait for that.

        :param timeout: In seconds. When they are over, the conversation is as well.
        :return: When *call* has an answer; or when the conversation is over and nobody knows the
            server's part.
        :raises BusyError: The caller is the thread that would have to do it. Nothing was sent.
        :raises DmaError: *call* was refused on this side. Nothing was sent.
        """
        if current_thread() is self._thread:
            raise BusyError("the thread that talks to the server cannot wait for it")
        self._calls.append(call)
        self._ring()
        if self._over:
            self._give_up()
        if not call.wait(timeout):
            self._fail(TimeoutError(errno.ETIMEDOUT, f"no answer in {timeout:g} s"))
        elif call.error is not None:
            raise call.error

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
        self._ring()

    def _ring(self) -> None:
        with self._ringing:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """End it, and wait until the thread has. Nothing happens the second time."""
        self._closed = True
        self._ring()
        if current_thread() is not self._thread:
            self._thread.join()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._talk()
        except Exception as error:
            if not isinstance(error, OSError | ProtocolError):
                _log.exception("the thread that talks to a vfio-user server fails")
            self.failure = self.failure or error
        finally:
            for link in self._links:
                link.close()
            with self._ringing:
                os.close(self._bell)
                self._bell = -1
            self._over = True
            for call in self._sent.values():
                call.finish()
            self._sent.clear()
            self._give_up()

    def _give_up(self) -> None:
        """
        Finish the calls that nobody will send any more.

        Each belongs to the thread that gets hold of it.
        """
        with suppress(IndexError):
            while True:
                self._calls.popleft().finish()

    def _talk(self) -> None:
        for link in self._links:
            self._poller.register(link, select.POLLIN)
        while not self._closed and self.failure is None:
            self._send_calls()
            # Not any(): each of them gets its turn.
            if not sum([self._take_event(link) for link in self._links]):
                self._sleep()

    def _take_event(self, link: Link) -> bool:
        """Deal with the next event of *link*; False: there is none."""
        link.flush()
        event = NEED_DATA if link.unsent > self._unsent_limit else link.event()
        if event is NEED_DATA:
            return False
        if event is CLOSED:
            raise ConnectionResetError(errno.ECONNRESET, "the server has closed the connection")
        if event.remarks:
            _log.debug("vfio-user server: %s", "; ".join(map(str, event.remarks)))
        if isinstance(event, Request):
            self._serve(link, event)
        else:
            self._finish(event)
        return True

    def _sleep(self) -> None:
        """Wait until a socket can go on, or somebody rings."""
        for link in self._links:
            listen = select.POLLIN if link.unsent <= self._unsent_limit else 0
            self._poller.modify(link, listen | (select.POLLOUT if link.unsent else 0))
        self._poller.poll()
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _send_calls(self) -> None:
        while self._calls and self._running is None:
            call = self._calls.popleft()
            try:
                call.begin(self._memory)
            except DmaError as error:
                call.finish(error=error)
                continue
            try:
                outgoing = self._link.connection.request(call.message, call.fds)
            except LocalProtocolError as error:
                call.end(self._memory, ErrorReply(call.message.command, errno.EINVAL))
                refusal = DmaError(errno.EINVAL, str(error))
                refusal.__cause__ = error
                call.finish(error=refusal)
                continue
            call.sent = True
            if call.runs_the_device and len(self._links) == 1:
                self._running = call
            self._sent[outgoing.message_id] = call
            self._link.queue(outgoing)

    def _serve(self, link: Link, request: Request) -> None:
        connection = link.connection
        with request:
            answer = self._memory.serve(request.message)
            if request.no_reply:
                return
            link.queue(
                connection.error(request, answer)
                if isinstance(answer, int)
                else connection.reply(request, answer)
            )

    def _finish(self, reply: Reply) -> None:
        # It stays among those that were sent until all is done: its waiter must not wake up before
        # a failure is known.
        call = self._sent[reply.message_id]
        with reply:
            call.end(self._memory, reply.message)
        del self._sent[reply.message_id]
        if call is self._running:
            self._running = None
        call.finish(answer=reply.message)
