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
from typing import NamedTuple

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Remark, Source
from ramblock.trace.readers.base import MAX_LINE, MAX_NAME, TraceReader, shorten
from ramblock.trace.readers.qemu_meaning import At, QemuMeaning, UnreadableError
from ramblock.trace.readers.qemu_table import EVENTS, IGNORED, Reading, Value, forms_of
from ramblock.trace.readers.registry import register

__all__ = ["HEADER_MAGIC", "SimpletraceReader"]

HEADER_ID = (1 << 64) - 1
HEADER_MAGIC = 0xF2B177CB0AA429B4
VERSION = 4
DROPPED_ID = (1 << 64) - 2
RECORD_MAPPING, RECORD_EVENT = 0, 1

_HEADER = struct.Struct("<QQQ")
_TYPE = struct.Struct("<Q")
_MAPPING = struct.Struct("<QI")
#: Type, number of the event, time, length of the record from here to its end, process.
_EVENT = struct.Struct("<QQQII")
_RECORD = struct.Struct("<QQII")
_WORD = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")


class _NeedMoreError(Exception):
    """The record is not complete yet."""


class _Layout(NamedTuple):
    """A form of an event whose fields are all words."""

    words: struct.Struct
    form: Reading


#: Names that are kept: QEMU has some 5,000 events.
_MOST_NAMES = 1 << 16


@register("simpletrace")
class SimpletraceReader(TraceReader):
    """A parser of QEMU's binary trace. A line is a record."""

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        self._meanings: dict[int, QemuMeaning] = {}
        self._names: dict[int, str] = {}
        #: By number and length of the fields.
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._sources: dict[int, Source] = {}
        self._buffer = b""
        self._offset = 0
        self._has_header = False

    def _take(self, data: bytes, found: list[Event]) -> None:
        buffer = self._buffer + data if self._buffer else data
        position = 0
        try:
            if not self._has_header:
                position = self._header(buffer)
            while position < len(buffer):
                position = self._record(buffer, position, found)
        except _NeedMoreError as need:
            position = need.args[0]
        self._buffer = buffer[position:]
        self._offset += position

    def _end(self, found: list[Event]) -> None:
        if self._buffer or not self._has_header:
            raise self.error(f"the trace ends in the middle of a record, at byte {self._offset:,}")

    def _record(self, buffer: bytes, position: int, found: list[Event]) -> int:
        """Read one record; return where the next begins."""
        try:
            kind, number, time, length, process = _EVENT.unpack_from(buffer, position)
        except struct.error:
            kind = number = time = length = process = None
        if kind != RECORD_EVENT:
            return self._other_record(buffer, position)
        if not _RECORD.size <= length <= MAX_LINE:
            raise self._fail(f"a record of {length} bytes", position)
        body, end = position + _EVENT.size, position + _TYPE.size + length
        if end > len(buffer):
            raise _NeedMoreError(position)
        self.counts.lines += 1
        layout = self._layouts.get((number, length))
        if layout is None:
            self._event(number, length, time, process, buffer[body:end], found)
        else:
            values = layout.form.from_words(list(layout.words.unpack_from(buffer, body)))
            self._translate(number, time, process, layout.form, values, b"", found)
        return end

    def _other_record(self, buffer: bytes, position: int) -> int:
        (kind,), after = _unpack(_TYPE, buffer, position, position)
        if kind == RECORD_MAPPING:
            return self._mapping(buffer, position, after)
        if kind != RECORD_EVENT:
            raise self._fail(f"record of type {kind:#x}, expected 0 or 1", position)
        (_, _, length, _), _ = _unpack(_RECORD, buffer, after, position)
        raise _NeedMoreError(position)

    def _header(self, buffer: bytes) -> int:
        (number, magic, version), after = _unpack(_HEADER, buffer, 0, 0)
        if (number, magic) != (HEADER_ID, HEADER_MAGIC):
            raise self._fail("no trace of QEMU's `simple` backend", 0)
        if version != VERSION:
            raise self._fail(f"version {version} of the format, expected {VERSION}", 0)
        self._has_header = True
        return after

    def _mapping(self, buffer: bytes, record: int, position: int) -> int:
        (number, length), after = _unpack(_MAPPING, buffer, position, record)
        if length > MAX_LINE:
            raise self._fail(f"an event whose name has {length} bytes", record)
        end = after + length
        if end > len(buffer):
            raise _NeedMoreError(record)
        if len(self._names) >= _MOST_NAMES:
            raise self._fail(f"more than {_MOST_NAMES:,} names of events", record)
        self._names[number] = shorten(buffer[after:end])
        for key in [key for key in self._layouts if key[0] == number]:
            del self._layouts[key]
        return end

    def _event(
        self, number: int, length: int, time: int, process: int, body: bytes, found: list[Event]
    ) -> None:
        line = self.counts.lines
        if number == DROPPED_ID:
            count = int.from_bytes(body[:8], "little")
            text = f"{count:,} events were dropped"
            found.append(Remark(time, self.source, line, "lost", text, lost=True))
            return
        name = self._names.get(number, "")
        if name in IGNORED:
            self.counts.note(name)
            return
        if name not in EVENTS:
            self.counts.note_unknown(line, (name or f"event number {number:#x}").encode())
            return
        for form in forms_of(name):
            values = _arguments(form.kinds, body)
            if values is not None:
                if "s" not in form.kinds and "a" not in form.kinds:
                    words = struct.Struct(f"<{len(form.kinds)}Q")
                    self._layouts[number, length] = _Layout(words, form)
                self._translate(number, time, process, form, form.from_words(values), body, found)
                return
        # Others than the versions of QEMU that are known write.
        self.counts.note_unreadable(line, name.encode())

    def _translate(
        self,
        number: int,
        time: int,
        process: int,
        form: Reading,
        values: tuple[Value, ...],
        body: bytes,
        found: list[Event],
    ) -> None:
        name = self._names[number]
        line = self.counts.lines
        source = self._guest_of(process)
        meaning = self._meanings.get(id(source))
        if meaning is None:
            meaning = QemuMeaning(self.virtio_mem_block_size, self.needs)
            self._meanings[id(source)] = meaning
        try:
            meaning.translate(name, form, values, At(time, source, line), found)
        except UnreadableError:
            self.counts.note_unreadable(line, name.encode() + b" " + body[:MAX_NAME])
        else:
            self.counts.note(name)

    def _guest_of(self, process: int) -> Source:
        source = self._sources.get(process)
        if source is None:
            source = self._sources[process] = self.guest(str(process))
        return source

    def _fail(self, text: str, position: int) -> TraceError:
        return self.error(f"{text}, at byte {self._offset + position:,}")


def _unpack(
    layout: struct.Struct, buffer: bytes, position: int, record: int
) -> tuple[tuple[int, ...], int]:
    end = position + layout.size
    if end > len(buffer):
        raise _NeedMoreError(record)
    return layout.unpack_from(buffer, position), end


def _arguments(kinds: str, body: bytes) -> list[Value] | None:
    """Read an event's fields; None: the record has others."""
    values: list[Value] = []
    position = 0
    try:
        for kind in kinds:
            if kind in "sa":
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
