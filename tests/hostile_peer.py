"""
A connection under a peer that sends what it likes, and what has to hold whatever that is.

Any bytes and descriptors become events or one ``RemoteProtocolError``; no other exception, no
descriptor that is closed twice or never, and no more memory than one message takes. Both the
Hypothesis tests and the fuzzer in ``fuzz/`` play this.
"""

from __future__ import annotations

import struct
from collections import Counter
from contextlib import suppress

from ramblock.dma.vfio_user import (
    CLOSED,
    NEED_DATA,
    OWN_CAPABILITIES,
    Capabilities,
    Connection,
    Reply,
    Request,
    Role,
)
from ramblock.dma.vfio_user.messages import (
    DmaMap,
    DmaMapReply,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaWrite,
    GetDeviceInfo,
    GetIrqInfo,
    GetRegionInfo,
    GetRegionIoFds,
    Message,
    RegionRead,
    RegionWrite,
    RegionWriteMulti,
    Reset,
    ResetReply,
    SetIrqs,
    UnknownRequest,
    Version,
    VersionReply,
)
from ramblock.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Victim", "play_bytes"]

SMALL = Capabilities(max_msg_fds=3, max_data_xfer_size=256, write_multiple=True)

#: What this side asks, so that there is something to answer.
QUESTIONS: tuple[Message, ...] = (
    DmaMap(3, 0, 0x1000, 0x1000),
    DmaUnmap(0, 0x1000, 0x1000),
    GetDeviceInfo(),
    GetRegionInfo(128, 1),
    GetRegionIoFds(128, 1),
    GetIrqInfo(16, 0),
    SetIrqs(33, 0, 0, 1),
    RegionRead(1, 8, 4),
    RegionWrite(1, 8, b"abcd"),
    RegionWriteMulti((RegionWrite(1, 8, b"abcd"),)),
    DmaRead(0x1000, 4),
    DmaWrite(0x1000, b"abcd"),
    Reset(),
    UnknownRequest(16, b"feature"),
)
#: What it answers, mostly to something else.
ANSWERS: tuple[Message, ...] = (
    DmaMapReply(),
    ResetReply(),
    DmaReadReply(0x1000, b"abcd"),
    VersionReply(0, 0, SMALL),
)


class Victim:
    """
    :param negotiated: Begin behind the handshake.
    """

    def __init__(
        self, role: Role, *, negotiated: bool, capabilities: Capabilities = OWN_CAPABILITIES
    ) -> None:
        self.given: list[int] = []
        self.closed: Counter[int] = Counter()
        self.connection = Connection(role, self._close, capabilities)
        self.events: list[Request | Reply] = []
        self.dead = False
        self.eof = False
        if negotiated:
            self._negotiate()

    def _close(self, number: int) -> None:
        self.closed[number] += 1

    def _negotiate(self) -> None:
        payload = struct.pack("=HH", 0, 0)
        connection = self.connection
        if connection.role is Role.CLIENT:
            asked = connection.request(Version(0, 0, connection.own)).message_id
            connection.receive(struct.pack("=HHIII", asked, 1, 20, 1, 0) + payload)
            assert isinstance(connection.next_event(), Reply)
        else:
            connection.receive(struct.pack("=HHIII", 0, 1, 20, 0, 0) + payload)
            request = connection.next_event()
            assert isinstance(request, Request)
            connection.reply(request, VersionReply(0, 0, connection.own))
        assert connection.negotiated

    def feed(self, data: bytes, fds: int) -> None:
        """Let bytes arrive with so many descriptors, and look at all that has arrived."""
        numbers = range(len(self.given), len(self.given) + fds)
        self.given.extend(numbers)
        try:
            self.connection.receive(data, numbers)
        except LocalProtocolError:
            assert self.dead
        self.drain()

    def drain(self) -> None:
        while not self.dead:
            try:
                event = self.connection.next_event()
            except RemoteProtocolError:
                self.dead = True
                return
            if event is CLOSED:
                assert self.eof
                return
            if event is NEED_DATA:
                assert not self.eof
                assert self.connection.wanted > 0
                assert len(self.connection._inbox) < self.connection.max_message_size
                return
            assert len(event.fds) <= self.connection.own.max_msg_fds
            self.events.append(event)

    def end(self) -> None:
        """The peer closes its side."""
        self.eof = True
        self.connection.receive_eof()
        self.drain()

    def ask(self, which: int, *, no_reply: bool = False) -> None:
        with suppress(LocalProtocolError):
            self.connection.request(QUESTIONS[which % len(QUESTIONS)], no_reply=no_reply)

    def answer(self, which: int) -> None:
        """Answer the latest request somehow."""
        requests = [event for event in self.events if isinstance(event, Request)]
        with suppress(LocalProtocolError, IndexError):
            if which % 5 == 0:
                self.connection.error(requests[-1], which)
            else:
                self.connection.reply(requests[-1], ANSWERS[which % len(ANSWERS)])
        self.dead = self.dead or self.connection.closed

    def check(self) -> None:
        """
        Everything that was given is closed once when all is over.

        What events hold, not before.
        """
        held = {number for event in self.events for number in event.fds}
        assert not held & self.closed.keys()
        if self.dead:
            assert held | self.closed.keys() == set(self.given)
        self.connection.close()
        for event in self.events:
            event.close()
            event.close()
        assert self.closed == Counter(self.given)


class _Bytes:
    """Reads numbers and pieces off a byte string; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def number(self) -> int:
        return int.from_bytes(self.take(1))


def play_bytes(data: bytes) -> Victim:
    """Read *data* as what a peer sends and what this side does meanwhile; check that all holds."""
    source = _Bytes(data)
    start = source.number()
    victim = Victim(
        Role.SERVER if start & 1 else Role.CLIENT,
        negotiated=bool(start & 2),
        capabilities=SMALL if start & 4 else OWN_CAPABILITIES,
    )
    while not source.over and not victim.eof:
        what = source.number()
        match what & 7:
            case 0 | 1:
                victim.feed(source.take(source.number()), source.number() % 5)
            case 2 | 3:
                # A whole message: the header's size is right, so that what lies behind it is looked
                # at.
                command, flags, message_id = source.number(), source.number(), source.number()
                payload = source.take(source.number())
                header = struct.pack(
                    "=HHIII", message_id, command, 16 + len(payload), flags, source.number()
                )
                victim.feed(header + payload, (what >> 3) % 5)
            case 4 | 5:
                victim.ask(source.number(), no_reply=bool(what & 8))
            case 6:
                victim.answer(source.number())
            case 7 if what == 0xFF:
                victim.end()
            case _:
                victim.feed(source.take(1), 300 if what == 0x7F else 0)
    victim.check()
    return victim
