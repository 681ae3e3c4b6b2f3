# SPDX-License-Identifier: Apache-2.0
"""The 16 bytes in front of every message."""

from __future__ import annotations

import struct
from typing import NamedTuple

from ramblock.dma.vfio_user.layout import MalformedError
from ramblock.dma.vfio_user.numbers import ERRNO_LIMIT, HEADER_SIZE, HeaderFlags

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
        return bool(self.flags & HeaderFlags.REPLY)

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

    def check(self, limit: int) -> None:
        """
        Check the rules for every message.

        :param limit: The largest message that is accepted, in bytes.
        :raises MalformedError: It is not.
        """
        kind = self.flags & _TYPE_MASK
        if kind > HeaderFlags.REPLY:
            raise MalformedError(f"type {kind:#x} is neither command nor reply")
        if self.flags & ~_KNOWN:
            raise MalformedError(f"unknown flags {self.flags & ~_KNOWN:#x}")
        if not HEADER_SIZE <= self.size <= limit:
            raise MalformedError(f"size {self.size:#x}, expected {HEADER_SIZE:#x} to {limit:#x}")
        if self.is_error and not self.is_reply:
            raise MalformedError("a command says that it failed")
        if self.no_reply and self.is_reply:
            raise MalformedError("a reply wants no reply")
        if self.is_error and self.errno >= ERRNO_LIMIT:
            raise MalformedError(f"error {self.errno:#x} is no errno")
        if self.is_error and self.size != HEADER_SIZE:
            raise MalformedError(f"an error reply of {self.size:#x} bytes, not {HEADER_SIZE:#x}")
