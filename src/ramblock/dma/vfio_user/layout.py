# SPDX-License-Identifier: Apache-2.0
"""Payloads of messages as values and back: the common part of requests and replies."""

from __future__ import annotations

import struct
from typing import ClassVar, Self

from ramblock.dma.vfio_user.numbers import Command

__all__ = ["EmptyMessage", "MalformedError", "Message", "read_fixed", "split_data"]


class MalformedError(ValueError):
    """
    A message that breaks a rule; the text says which. It does not leave this package.

    The connection knows who is to blame, and makes a ``LocalProtocolError`` or a
    ``RemoteProtocolError`` of it.
    """


class Message:
    """The payload of a request or of a reply that is no error."""

    __slots__ = ()

    command: ClassVar[Command]
    #: Descriptors that may come with it; None: as many as the receiver takes in one message.
    max_fds: ClassVar[int | None] = 0
    #: Fields of a reply that repeat the request's.
    repeats: ClassVar[tuple[str, ...]] = ()
    #: Bytes of the payload, of a message that means nothing by more; None: each byte counts.
    fixed_size: ClassVar[int | None] = None

    @property
    def amount(self) -> int:
        """How much it asks for, or says was done: in bytes, or in writes."""
        return 0

    def pack(self) -> bytes:
        """
        Write the payload.

        :raises MalformedError: It would break the protocol.
        :raises struct.error: A number does not fit its field.
        """
        raise NotImplementedError

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """
        Read a payload.

        :raises MalformedError: It is none of this message.
        """
        raise NotImplementedError


class EmptyMessage(Message):
    """A message without payload."""

    __slots__ = ()
    fixed_size: ClassVar = 0

    def pack(self) -> bytes:
        """Write nothing."""
        return b""

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read nothing."""
        return cls()


def read_fixed(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    """
    Read a payload of fixed size. More is taken, and ignored: SPDK sends its whole buffer.

    (SPDK: lib/vfio_user/host/vfio_user.c, vfio_user_get_dev_region_info(); libvfio-user's handlers
    compare with "less than".)

    :raises MalformedError: It is shorter.
    """
    if len(payload) < layout.size:
        raise MalformedError(f"payload of {len(payload):#x} bytes, expected {layout.size:#x}")
    return layout.unpack_from(payload)


def split_data(layout: struct.Struct, payload: bytes) -> tuple[tuple[int, ...], bytes]:
    """
    Read a payload of a fixed part, and data behind it.

    :raises MalformedError: It is shorter than the fixed part.
    """
    if len(payload) < layout.size:
        raise MalformedError(
            f"payload of {len(payload):#x} bytes, expected {layout.size:#x} or more"
        )
    return layout.unpack_from(payload), payload[layout.size :]
