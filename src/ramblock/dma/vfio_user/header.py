# SPDX-License-Identifier: Apache-2.0
"""The 16 bytes in front of every message."""

from __future__ import annotations

import struct
from typing import NamedTuple

from ramblock.dma.vfio_user.layout import MalformedError
from ramblock.dma.vfio_user.numbers import HEADER_SIZE, HeaderFlags

__all__ = ["Header"]

# id, command, size of the whole message, flags, errno; in the host's byte order, as everything in
# the protocol.
_LAYOUT = struct.Struct("=HHIII")
assert _LAYOUT.size == HEADER_SIZE

_TYPE_MASK = 0xF
# An int: the complement of an IntFlag has only bits that are flags.
_KNOWN = int(_TYPE_MASK | HeaderFlags.NO_REPLY | HeaderFlags.ERROR)


class Header(NamedTuple):
    """A header, field by field."""

    message_id: int
    command: int
    size: int
    """Of the whole message, header included, in bytes."""
    flags: int = 0
    errno: int = 0
    """Of an error reply, 0 where it does not say which; reserved elsewhere."""

    @property
    def is_reply(self) -> bool:
        """Whether it answers a command."""
        return self.flags & _TYPE_MASK == HeaderFlags.REPLY

    @property
    def is_error(self) -> bool:
        """Whether it answers that the command failed."""
        return bool(self.flags & HeaderFlags.ERROR)

    @property
    def no_reply(self) -> bool:
        """Whether it is a command that wants no answer."""
        return bool(self.flags & HeaderFlags.NO_REPLY)

    def pack(self) -> bytes:
        """Write it."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Header:
        """Read the first 16 bytes of *data*."""
        return cls._make(_LAYOUT.unpack_from(data))

    def check_kind(self) -> None:
        """
        Check that it is a command or a reply.

        :raises MalformedError: It is neither.
        """
        kind = self.flags & _TYPE_MASK
        if kind > HeaderFlags.REPLY:
            raise MalformedError(f"type {kind:#x} is neither command nor reply")

    def odd_flags(self) -> str | None:
        """
        Tell what is odd about the flags; None: nothing is.

        They are ignored, as libvfio-user does (lib/libvfio-user.c, is_valid_header()).
        """
        if unknown := self.flags & ~_KNOWN:
            return f"unknown flags {unknown:#x}"
        if self.is_error and not self.is_reply:
            return "a command says that it failed"
        if self.no_reply and self.is_reply:
            return "a reply wants no reply"
        return None
