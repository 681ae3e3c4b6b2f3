# SPDX-License-Identifier: Apache-2.0
"""
Capability chains behind the answers of VFIO (struct vfio_info_cap_header, linux/vfio.h).

An answer says how long it would like to be (``argsz``) and where its first capability is; each
capability says where the next one is. Nothing of it is taken on trust: for any bytes the outcome is
a list of capabilities or an error.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from ramblock.errors import DmaError
from ramblock.uapi.vfio import CapabilityHeader

__all__ = ["Capability", "ask_with_chain", "read_array", "read_structure", "walk_chain"]

# The longest chains known are a few hundred bytes; the IOVA ranges of a large host have been seen
# to take two KiB.
_MAX_ANSWER = 1 << 20

_Structure = TypeVar("_Structure", bound=ctypes.Structure)


class Capability(NamedTuple):
    """An entry of a chain; its bytes begin at *offset* of the answer, with the header."""

    id: int
    version: int
    offset: int


def ask_with_chain(
    kind: type[_Structure], ask: Callable[[ctypes.Array[ctypes.c_char]], object]
) -> bytes:
    """
    Ask until the answer has room for all of its capabilities.

    :param kind: The structure that the answer begins with; its first field is ``argsz``.
    :param ask: Makes the call on a buffer.
    :return: The answer, as long as it said.
    :raises DmaError: EPROTO: the answer wants an absurd size. And the exceptions of *ask*.
    """
    size = ctypes.sizeof(kind)
    while True:
        buffer = ctypes.create_string_buffer(size)
        ctypes.c_uint32.from_buffer(buffer).value = size
        ask(buffer)
        wanted = ctypes.c_uint32.from_buffer(buffer).value
        if wanted <= size:
            return buffer.raw
        if wanted > _MAX_ANSWER:
            raise DmaError(errno.EPROTO, f"the kernel's answer wants {wanted:#x} bytes")
        size = wanted


def walk_chain(answer: bytes, first: int) -> Iterator[Capability]:
    """
    Yield the capabilities of *answer*.

    :param first: Offset of the first one in bytes; 0: there are none.
    :raises DmaError: EPROTO: a capability outside the answer, or one that comes again.
    """
    seen: set[int] = set()
    offset = first
    while offset:
        if offset in seen:
            raise DmaError(errno.EPROTO, f"the capability at {offset:#x} comes twice")
        seen.add(offset)
        header = read_structure(answer, offset, CapabilityHeader)
        yield Capability(header.id, header.version, offset)
        offset = header.next


def read_structure(answer: bytes, offset: int, kind: type[_Structure]) -> _Structure:
    """
    Read a structure at *offset*.

    :raises DmaError: EPROTO: it does not lie inside.
    """
    _check(answer, offset, ctypes.sizeof(kind))
    return kind.from_buffer_copy(answer, offset)


def read_array(answer: bytes, offset: int, kind: type[_Structure], count: int) -> list[_Structure]:
    """
    Read *count* structures, the first at *offset*.

    :raises DmaError: EPROTO: they do not lie inside.
    """
    size = ctypes.sizeof(kind)
    _check(answer, offset, size * count)
    return [kind.from_buffer_copy(answer, offset + size * index) for index in range(count)]


def _check(answer: bytes, offset: int, size: int) -> None:
    if offset + size > len(answer):
        raise DmaError(
            errno.EPROTO,
            f"the kernel's answer has {len(answer):#x} bytes, {size:#x} are expected at"
            f" {offset:#x}",
        )
