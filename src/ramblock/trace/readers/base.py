# SPDX-License-Identifier: Apache-2.0
"""
The base of all readers of traces: bytes in, events out, in any chunking.

A reader's own part is two methods. Counting, line numbers, bounds and errors are here: whatever a
recording holds, a caller gets events and at most a :class:`~ramblock.errors.TraceError` that names
file and line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Source

__all__ = ["MAX_LINE", "MAX_NAME", "LineReader", "ReadCounts", "TraceReader", "shorten"]

#: Bytes of a line, or of a record; a longer one is not kept.
MAX_LINE = 1 << 20
#: Bytes of a name or a text that an event keeps; a recording cannot fill memory with them.
MAX_NAME = 256

_EXAMPLES = 5
_EXAMPLE_LENGTH = 120
_UNREADABLE_KEPT = 100
#: Guests and targets that are told apart. A node has some hundred at most, and each costs memory.
MOST_SOURCES = 4096


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
    unreadable: list[tuple[int, str]] = []
    """The first lines whose event is known and could not be read: line, and its text."""
    unreadable_lines: int = 0
    """All of them."""
    duplicates: int = 0
    """Lines that a second logger has written once more; they count once."""

    def note(self, name: str, times: int = 1) -> None:
        """Count an event that was understood."""
        self.by_name[name] = self.by_name.get(name, 0) + times

    def note_unknown(self, line: int, raw: bytes) -> None:
        """Count a line that was not understood."""
        self.unknown += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((line, shorten(raw, _EXAMPLE_LENGTH)))

    def note_unreadable(self, line: int, raw: bytes) -> None:
        """Count a line whose event is known, and which could not be read."""
        self.unreadable_lines += 1
        if len(self.unreadable) < _UNREADABLE_KEPT:
            self.unreadable.append((line, shorten(raw)))


def shorten(text: bytes, most: int = MAX_NAME) -> str:
    """Decode a stranger's text, and keep at most so many characters."""
    return text[:most].decode(errors="backslashreplace")[:most]


class TraceReader(ABC):
    """
    Turns the bytes of one format into events.

    :param virtio_mem_block_size: Bytes; QEMU's traces count virtio-mem in blocks whose size they do
        not tell.
    """

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        #: The input; a guest that is told by its process gets a source of its own.
        self.source = source
        self.counts = ReadCounts()
        self.virtio_mem_block_size = virtio_mem_block_size
        #: What would tell more, and other gaps of the trace, in sentences by a keyword.
        self.needs: dict[str, str] = {}
        self._guests: dict[str, Source] = {}
        self._error: TraceError | None = None

    @property
    def recognized(self) -> bool:
        """Whether there was anything of its format."""
        return bool(self.counts.by_name or self.counts.unreadable_lines)

    def feed(self, data: bytes) -> list[Event]:
        """
        Take bytes in any chunking; return the events that are complete.

        Input that cannot be read on ends the reading: the events before it are returned, and the
        next call raises.

        :raises TraceError: The reading has ended.
        """
        if self._error is not None:
            raise self._error
        found: list[Event] = []
        self._guarded(found, data)
        return found

    def finish(self) -> list[Event]:
        """
        Take the end of the input; return the last events.

        :raises TraceError: The reading has ended, or the input ends in the middle of a record.
        """
        if self._error is not None:
            raise self._error
        found: list[Event] = []
        self._guarded(found, None)
        if self._error is not None:
            raise self._error
        return found

    def _guarded(self, found: list[Event], data: bytes | None) -> None:
        try:
            if data is None:
                self._end(found)
            else:
                self._take(data, found)
        except TraceError as error:
            self._error = error
        except Exception as error:
            # A net under every reader, ours and others': the input is a stranger's, and a
            # traceback would lose the findings before it, and those of the other files.
            self._error = self.error(f"the reader failed: {type(error).__name__}: {error}"[:300])
            self._error.__cause__ = error
        self.counts.events += len(found)

    @abstractmethod
    def _take(self, data: bytes, found: list[Event]) -> None:
        """
        Append the events that are complete.

        :raises TraceError: It cannot be read on. What was appended counts.
        """

    @abstractmethod
    def _end(self, found: list[Event]) -> None:
        """Append the last events, like :meth:`_take`."""

    def error(self, text: str, line: int | None = None) -> TraceError:
        """Make an error that names file and line: by default the one behind the last counted."""
        line = self.counts.lines + 1 if line is None else line
        return TraceError(f"{self.source.name}:{line}: {text}", path=self.source.name, line=line)

    def guest(self, process: str | None) -> Source:
        """Return the source of the guest that a process runs."""
        if process is None:
            return self.source
        source = self._guests.get(process)
        if source is None:
            if len(self._guests) >= MOST_SOURCES:
                self.needs["guests"] = (
                    f"more than {MOST_SOURCES:,} processes: those behind them are not told apart"
                )
                return self.source
            source = Source(self.source.name, self.source.format, process)
            self._guests[process] = source
        return source

    def name_format(self, name: str) -> None:
        """Say which format it turned out to be."""
        for source in (self.source, *self._guests.values()):
            source.format = name


class LineReader(TraceReader):
    """
    A reader of a text format.

    Lines that it does not know are counted, and none of them ends the reading. A line of more than
    :data:`MAX_LINE` bytes is not kept while it comes in: its first bytes stand for it.
    """

    _tail = b""
    _skipping = False

    def _take(self, data: bytes, found: list[Event]) -> None:
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                return
            data = data[end:]
            self._skipping = False
        end = data.rfind(b"\n") + 1
        if not end:
            self._tail += data
        else:
            block = self._tail + data[:end] if self._tail else data[:end]
            self._tail = data[end:]
            self._block(block, found)
        if len(self._tail) > MAX_LINE:
            self._tail = self._tail[:MAX_LINE]
            self._skipping = True

    def _end(self, found: list[Event]) -> None:
        tail, self._tail = self._tail, b""
        if tail:  # a last line without its end counts like any other
            self._block(tail + b"\n", found)

    def _block(self, block: bytes, found: list[Event]) -> None:
        """Read whole lines, each with its end. A reader may do better than one after the other."""
        counts = self.counts
        for raw in block[:-1].split(b"\n"):
            self._line(raw, counts.lines + 1, found)
            counts.lines += 1

    @abstractmethod
    def _line(self, raw: bytes, number: int, found: list[Event]) -> None:
        """Append the events of a line, and count what it is."""
