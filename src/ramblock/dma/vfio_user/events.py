# SPDX-License-Identifier: Apache-2.0
"""Events out of a connection, and messages into a socket."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NamedTuple

from ramblock.dma.vfio_user.descriptors import Descriptors
from ramblock.dma.vfio_user.layout import Message
from ramblock.dma.vfio_user.replies import ErrorReply

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "Event",
    "Oddity",
    "Outgoing",
    "Pause",
    "Remark",
    "Reply",
    "Request",
]


class Oddity(Enum):
    """The kinds of things that a message has and should not have; it is taken all the same."""

    LONG_PAYLOAD = "payload longer than its structure"
    DESCRIPTORS = "descriptors that do not belong to their message"
    FLAGS = "header flags that mean nothing"
    ERROR_WITH_PAYLOAD = "error reply with a payload"
    ERRNO = "error reply with a number that is no errno"
    NO_PAYLOAD = "success without its payload"


class Remark(NamedTuple):
    """One of them."""

    oddity: Oddity
    text: str


class Pause(Enum):
    """No message yet, or none any more."""

    NEED_DATA = "need data"
    """The next message is not complete."""
    CLOSED = "closed"
    """The peer has closed its side, between two messages."""


NEED_DATA: Final = Pause.NEED_DATA
CLOSED: Final = Pause.CLOSED


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """
    A command from the peer. It owns its descriptors; closing it closes those that nobody took.

    Answer it with ``Connection.reply`` or ``Connection.error``, unless the peer wants no answer.
    """

    message_id: int
    message: Message
    fds: Descriptors
    no_reply: bool
    remarks: tuple[Remark, ...] = ()

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        self.fds.close()

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """
    The peer's answer to a request of ours.

    It owns its descriptors; closing it closes those that nobody took.
    """

    message_id: int
    message: Message | ErrorReply
    fds: Descriptors
    request: Message
    """The request that it answers."""
    remarks: tuple[Remark, ...] = ()

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        self.fds.close()

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Event = Request | Reply | Literal[Pause.NEED_DATA, Pause.CLOSED]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to be sent: all bytes, and the descriptors with the first of them."""

    message_id: int
    data: bytes
    fds: tuple[int, ...] = ()
    """Still the caller's, who keeps them open until the message is sent."""
