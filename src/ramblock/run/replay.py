# SPDX-License-Identifier: Apache-2.0
"""A recorded trace as a workload: its guest, and its requests in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ramblock.discard.attributes import PageState
from ramblock.errors import TraceError
from ramblock.run.guest_script import Action, Request
from ramblock.run.layout import BlockPlace
from ramblock.trace.writer import TRACE_VERSION
from ramblock.units import PAGE_SIZE

__all__ = ["RecordedGuest"]

T = TypeVar("T")


class _Event(msgspec.Struct):
    event: str


# The bounds of a guest of ours: a trace is not trusted, and might name one that takes the host's
# memory.
_Address = Annotated[int, msgspec.Meta(ge=0, multiple_of=PAGE_SIZE, le=1 << 52)]
_Size = Annotated[int, msgspec.Meta(gt=0, multiple_of=PAGE_SIZE, le=1 << 40)]
_Hex = Annotated[str, msgspec.Meta(pattern="^-?0x[0-9a-f]{1,32}$")]


class _Block(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(pattern="^[ -~]{1,64}$")]
    gpa: _Address
    size: _Size
    confidential: bool


class _Start(msgspec.Struct):
    version: int
    blocks: Annotated[list[_Block], msgspec.Meta(min_length=1, max_length=64)]


class _Conversion(msgspec.Struct):
    gpa: int | _Hex
    """A number; in hex as a string where it does not fit into 64 bits."""
    size: int | _Hex
    to: PageState
    action: Action = Action.HOSTILE


def _number(value: int | str) -> int:
    return value if isinstance(value, int) else int(value, 16)


class RecordedGuest:
    """
    The guest of a trace in our own format.

    :raises TraceError: The first line does not describe a guest.
    :raises OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            line = file.readline()
        start = self._decode(line, 1, _Start)
        if start.version != TRACE_VERSION:
            raise TraceError(
                f"{path}:1: trace version {start.version}, expected {TRACE_VERSION}",
                path=str(path),
                line=1,
            )
        self.places = [
            BlockPlace(block.name, block.gpa, block.size, block.confidential)
            for block in start.blocks
        ]

    def _decode(self, line: bytes, number: int, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise TraceError(
                f"{self._path}:{number}: {error}", path=str(self._path), line=number
            ) from None

    def requests(self) -> Iterator[Request]:
        """
        Yield the requests.

        :raises TraceError: A line is no event; those before it were yielded.
        """
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                event = self._decode(line, number, _Event).event
                if event == "reset":
                    yield Request(0, 0, PageState.PRIVATE, Action.REBOOT)
                elif event == "conversion":
                    entry = self._decode(line, number, _Conversion)
                    yield Request(_number(entry.gpa), _number(entry.size), entry.to, entry.action)
