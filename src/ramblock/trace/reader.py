# SPDX-License-Identifier: Apache-2.0
"""The base of all readers of traces: bytes in, events out, in any chunking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import msgspec

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Source

__all__ = ["MAX_LINE", "LineReader", "LineSplitter", "ReadCounts", "TraceReader", "trace_error"]

#: Bytes of a line, or of a record; a longer one is not kept.
MAX_LINE = 1 << 20

_EXAMPLES = 5
_EXAMPLE_LENGTH = 120


class ReadCounts(msgspec.Struct):
    """Counts of a reader."""

    lines: int = 0
    events: int = 0
    unknown: int = 0
    """Lines, or records, that it did not understand."""
    examples: list[tuple[int, str]] = []
    """The first few of them: line, and how it begins."""
    by_name: dict[str, int] = {}
    """How often each event was there, also of those that mean nothing here."""

    def note_unknown(self, line: int, raw: bytes) -> None:
        """Count a line that was not understood."""
        self.unknown += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((line, raw[:_EXAMPLE_LENGTH].decode(errors="backslashreplace")))


class TraceReader(Protocol):
    """Turns the bytes of one format into events."""

    source: Source
    counts: ReadCounts

    def feed(self, data: bytes) -> list[Event]:
        """
        Take bytes in any chunking; return the events that are complete.

        Unreadable input ends the reading: the events before it are returned, and the next call
        raises.

        :raises TraceError: The reading has ended.
        """

    def finish(self) -> list[Event]:
        """
        Take the end of the input; return the last events.

        :raises TraceError: The reading has ended, or the input ends in the middle of a record.
        """


class LineSplitter:
    """
    Cuts bytes into lines without their ends.

    A line of more than :data:`MAX_LINE` bytes is not kept while it comes in: its first bytes stand
    for it.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the lines that are complete."""
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                return []
            data = data[end:]
            self._skipping = False
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > MAX_LINE:
            self._tail = self._tail[:MAX_LINE]
            self._skipping = True
        return lines

    def finish(self) -> list[bytes]:
        """Take the end of the input; return the rest, if any."""
        tail, self._tail = self._tail, b""
        return [tail] if tail else []


class LineReader(ABC):
    """A reader of a text format: unknown lines are counted, and none of them ends the reading."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.counts = ReadCounts()
        self._lines = LineSplitter()

    def feed(self, data: bytes) -> list[Event]:
        """Take bytes; return the events of the lines that are complete."""
        return self._parse(self._lines.feed(data))

    def finish(self) -> list[Event]:
        """Take the end of the input; a last line without its end counts like any other."""
        return self._parse(self._lines.finish())

    @abstractmethod
    def _parse(self, lines: list[bytes]) -> list[Event]:
        """Turn lines into events, and count."""


def trace_error(source: Source, line: int, text: str) -> TraceError:
    """Make an error that names file and line."""
    return TraceError(f"{source.name}:{line}: {text}", path=source.name, line=line)
