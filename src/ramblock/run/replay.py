# SPDX-License-Identifier: Apache-2.0
"""A recorded trace as a workload: its guest, and its requests in the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from ramblock.errors import TraceError
from ramblock.memory.attributes import PageState
from ramblock.run.guest_script import Action, Request
from ramblock.run.layout import BlockPlace
from ramblock.run.trace_writer import TRACE_VERSION

__all__ = ["RecordedGuest"]

T = TypeVar("T")


class _Event(msgspec.Struct):
    event: str


class _Block(msgspec.Struct):
    name: str
    gpa: int
    size: int
    confidential: bool


class _Start(msgspec.Struct):
    version: int
    blocks: list[_Block]


class _Conversion(msgspec.Struct):
    gpa: int | str
    """A number; in hex as a string where it does not fit into 64 bits."""
    size: int | str
    to: PageState
    action: str = Action.HOSTILE.value


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
                if self._decode(line, number, _Event).event == "conversion":
                    entry = self._decode(line, number, _Conversion)
                    yield Request(
                        _number(entry.gpa), _number(entry.size), entry.to, Action(entry.action)
                    )
