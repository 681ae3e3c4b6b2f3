# SPDX-License-Identifier: Apache-2.0
"""Each side's account of itself in the JSON of a VERSION message."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ramblock.dma.vfio_user.layout import MalformedError
from ramblock.dma.vfio_user.numbers import (
    DEFAULT_MAX_DATA_XFER_SIZE,
    DEFAULT_MAX_DMA_MAPS,
    DEFAULT_MAX_MSG_FDS,
    DEFAULT_PGSIZES,
    MAX_VERSION_DATA,
)

__all__ = ["Capabilities"]

_FIELD_LIMIT = 1 << 64
_NUMBERS = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """
    The capabilities of one side.

    A name that is not here (``migration``) is not used, and ignored.

    The values of a new object are those that hold for a peer that says nothing.
    """

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    """How many descriptors it takes in one message; 0: it takes none."""
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    """How many bytes of data it takes in one message; at least 1, or nothing could be done."""
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    """How many DMA windows may exist at once."""
    pgsizes: int = DEFAULT_PGSIZES
    """Page sizes of DMA windows, one bit each."""
    write_multiple: bool = False
    """Whether it takes REGION_WRITE_MULTI."""
    twin_socket: bool = False
    """Whether the server's commands may have, or in the server's answer: have, their own socket."""
    twin_fd_index: int | None = None
    """Which of the answer's descriptors that socket is."""

    def pack(self) -> bytes:
        """Write the JSON, with its NUL."""
        members: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        members["write_multiple"] = self.write_multiple
        if self.twin_socket:
            twin: dict[str, Any] = {"supported": True}
            if self.twin_fd_index is not None:
                twin["fd_index"] = self.twin_fd_index
            members["twin_socket"] = twin
        return json.dumps({"capabilities": members}).encode() + b"\0"

    @classmethod
    def unpack(cls, data: bytes) -> Capabilities:
        """
        Read the JSON of a VERSION message; a peer that says nothing sends no bytes.

        :raises MalformedError: It is too long, not JSON with a NUL behind it, or a capability has
            the wrong type or a value that nobody could work with.
        """
        if not data:
            return cls()
        members = _members(_decode(data))
        found: dict[str, Any] = {}
        for name in _NUMBERS:
            if name in members:
                found[name] = _number(name, members[name])
        if "write_multiple" in members:
            found["write_multiple"] = _truth("write_multiple", members["write_multiple"])
        if "twin_socket" in members:
            found |= _twin(members["twin_socket"])
        if found.get("pgsizes") == 0:
            raise MalformedError("capability pgsizes has no page size")
        if found.get("max_data_xfer_size") == 0:
            raise MalformedError("capability max_data_xfer_size has no room for a byte")
        return cls(**found)

    @property
    def page_size(self) -> int:
        """The smallest page of DMA windows, in bytes."""
        return self.pgsizes & -self.pgsizes


def _decode(data: bytes) -> Any:
    if len(data) > MAX_VERSION_DATA:
        raise MalformedError(f"version data of {len(data):#x} bytes, limit {MAX_VERSION_DATA:#x}")
    if data.find(b"\0") != len(data) - 1:
        raise MalformedError("version data does not end with its only NUL")
    try:
        # A ValueError also stands for text that is not UTF-8, and for a number of thousands of
        # digits.
        return json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"version data is no JSON: {error}") from None


def _members(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise MalformedError("version data is no JSON object")
    members = document.get("capabilities", {})
    if not isinstance(members, dict):
        raise MalformedError("capabilities are no JSON object")
    return members


def _twin(twin: Any) -> dict[str, Any]:
    if not isinstance(twin, dict):
        raise MalformedError("capability twin_socket is no JSON object")
    if not _truth("twin_socket.supported", twin.get("supported", False)):
        return {}
    index = twin.get("fd_index")
    return {
        "twin_socket": True,
        "twin_fd_index": None if index is None else _number("twin_socket.fd_index", index),
    }


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MalformedError(f"capability {name} is not true or false")
    return value


def _number(name: str, value: Any) -> int:
    # True is an int too. A float is none: JSON has one kind of number, but peers write these as
    # whole ones.
    if type(value) is not int or not 0 <= value < _FIELD_LIMIT:
        raise MalformedError(f"capability {name} is not a whole number of 64 bits")
    return value
