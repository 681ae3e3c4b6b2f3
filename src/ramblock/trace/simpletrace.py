# SPDX-License-Identifier: Apache-2.0
"""
Reads QEMU's binary trace (its ``simple`` backend, version 4 of the format).

The file is a header of three 64-bit words, then records, each with a 64-bit type: 0 maps an event's
number to its name, 1 is an event. An event has its number, a time in nanoseconds, the record's
length, the process, and its arguments: 64 bits each, or a string with its length. Words are in the
order of the host that wrote them; x86 is taken for granted. Which arguments an event has is not in
the file (trace/simple.c and scripts/simpletrace.py of QEMU).
"""

from __future__ import annotations

import struct

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Remark, Source
from ramblock.trace.qemu_events import QemuEvents
from ramblock.trace.qemu_formats import FORMATS, IGNORED, QemuValue
from ramblock.trace.reader import MAX_LINE, ReadCounts, trace_error

__all__ = ["HEADER_MAGIC", "SimpletraceReader"]

HEADER_ID = (1 << 64) - 1
HEADER_MAGIC = 0xF2B177CB0AA429B4
VERSION = 4
DROPPED_ID = (1 << 64) - 2
RECORD_MAPPING, RECORD_EVENT = 0, 1

_HEADER = struct.Struct("<QQQ")
_TYPE = struct.Struct("<Q")
_MAPPING = struct.Struct("<QI")
#: Number of the event, time, length of the record from here to its end, process.
_RECORD = struct.Struct("<QQII")
_WORD = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")


class _NeedMoreError(Exception):
    """The record is not complete yet."""


class SimpletraceReader:
    """
    A parser of QEMU's binary trace.

    :param virtio_mem_block_size: Bytes; the ``block-size`` of the guest's virtio-mem device.
    """

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        self.source = source
        self.counts = ReadCounts()
        self._events = QemuEvents(source, virtio_mem_block_size)
        self._names: dict[int, str] = {}
        self._buffer = b""
        self._offset = 0
        self._has_header = False
        self._error: TraceError | None = None

    @property
    def needs(self) -> dict[str, str]:
        """Further sources that would tell more, by a keyword."""
        return self._events.needs

    def feed(self, data: bytes) -> list[Event]:
        """
        Take bytes; return the events of the records that are complete.

        :raises TraceError: A record before these bytes could not be read.
        """
        if self._error is not None:
            raise self._error
        buffer = self._buffer + data
        position = 0
        found: list[Event] = []
        try:
            while position < len(buffer):
                position = self._record(buffer, position, found)
        except _NeedMoreError:
            pass
        except TraceError as error:
            self._error = error
        self._buffer = buffer[position:]
        self._offset += position
        self.counts.events += len(found)
        return found

    def finish(self) -> list[Event]:
        """
        Take the end of the input.

        :raises TraceError: It ends in the middle of a record.
        """
        if self._error is not None:
            raise self._error
        if self._buffer or not self._has_header:
            raise trace_error(
                self.source,
                self.counts.lines + 1,
                f"the trace ends in the middle of a record, at byte {self._offset:,}",
            )
        return []

    def _record(self, buffer: bytes, position: int, found: list[Event]) -> int:
        """Read one record; return where the next begins."""
        if not self._has_header:
            return self._header(buffer, position)
        kind, after = _unpack(_TYPE, buffer, position)
        if kind[0] == RECORD_MAPPING:
            return self._mapping(buffer, after)
        if kind[0] != RECORD_EVENT:
            raise self._fail(f"record of type {kind[0]:#x}, expected 0 or 1", position)
        (number, time, length, _pid), body = _unpack(_RECORD, buffer, after)
        end = after + length
        if not _RECORD.size <= length <= MAX_LINE:
            raise self._fail(f"a record of {length} bytes", position)
        if end > len(buffer):
            raise _NeedMoreError
        self.counts.lines += 1
        self._event(number, time, buffer[body:end], found)
        return end

    def _header(self, buffer: bytes, position: int) -> int:
        (number, magic, version), after = _unpack(_HEADER, buffer, position)
        if (number, magic) != (HEADER_ID, HEADER_MAGIC):
            raise self._fail("no trace of QEMU's `simple` backend", position)
        if version != VERSION:
            raise self._fail(f"version {version} of the format, expected {VERSION}", position)
        self._has_header = True
        return after

    def _mapping(self, buffer: bytes, position: int) -> int:
        (number, length), after = _unpack(_MAPPING, buffer, position)
        if length > MAX_LINE:
            raise self._fail(f"an event whose name has {length} bytes", position)
        end = after + length
        if end > len(buffer):
            raise _NeedMoreError
        self._names[number] = buffer[after:end].decode(errors="replace")
        return end

    def _event(self, number: int, time: int, body: bytes, found: list[Event]) -> None:
        line = self.counts.lines
        if number == DROPPED_ID:
            count = int.from_bytes(body[:8], "little")
            found.append(
                Remark(time, self.source, line, "lost", f"{count:,} events were dropped", lost=True)
            )
            return
        name = self._names.get(number, "")
        known = FORMATS.get(name)
        values = None if known is None else _arguments(known.kinds, body)
        if known is not None and values is not None:
            found += self._events.translate(name, time, line, known.from_words(values))
        elif name not in IGNORED:
            self.counts.note_unknown(line, (name or f"event number {number:#x}").encode())
            return
        by_name = self.counts.by_name
        by_name[name] = by_name.get(name, 0) + 1

    def _fail(self, text: str, position: int) -> TraceError:
        where = self._offset + position
        return trace_error(self.source, self.counts.lines + 1, f"{text}, at byte {where:,}")


def _unpack(layout: struct.Struct, buffer: bytes, position: int) -> tuple[tuple[int, ...], int]:
    end = position + layout.size
    if end > len(buffer):
        raise _NeedMoreError
    return layout.unpack_from(buffer, position), end


def _arguments(kinds: str, body: bytes) -> list[QemuValue] | None:
    """
    Read an event's arguments.

    None: the record has others than this version of QEMU is known to write.
    """
    values: list[QemuValue] = []
    position = 0
    try:
        for kind in kinds:
            if kind == "s":
                (length,) = _LENGTH.unpack_from(body, position)
                position += _LENGTH.size
                if position + length > len(body):
                    return None
                values.append(body[position : position + length])
                position += length
            else:
                (word,) = _WORD.unpack_from(body, position)
                values.append(word)
                position += _WORD.size
    except struct.error:
        return None
    return values if position == len(body) else None
