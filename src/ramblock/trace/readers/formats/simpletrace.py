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
from ramblock.trace.readers.base import MAX_LINE, MAX_NAME, MOST_SOURCES, TraceReader, shorten
from ramblock.trace.readers.qemu_meaning import QemuMeaning, UnreadableError
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
_NAMED = struct.Struct("<QQI")
_MAPPING = struct.Struct("<QI")
#: Type, number of the event, time, length of the record from here to its end, process.
_EVENT = struct.Struct("<QQQII")
_RECORD = struct.Struct("<QQII")
_WORD = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")


class _NeedMoreError(Exception):
    """The record is not complete yet."""


class _Layout:
    """The records of one length of an event: words, and perhaps a string at the end."""

    def __init__(self, name: str, form: Reading, values: list[Value]) -> None:
        self.name = name
        self.form = form
        last = values[-1] if values else 0
        #: Bytes of the string; None: there is none.
        self.string = len(last) if isinstance(last, bytes) else None
        words = len(values) if self.string is None else len(values) - 1
        string = "" if self.string is None else f"I{self.string}s"
        self.unpack = struct.Struct(f"<{words}Q{string}").unpack_from
        #: Events that were read and are not counted yet.
        self.times = 0


#: Names that are kept: QEMU has some 5,000 events.
_MOST_NAMES = 1 << 16
_MOST_LAYOUTS = 1 << 10


@register("simpletrace")
class SimpletraceReader(TraceReader):
    """A parser of QEMU's binary trace. A line is a record."""

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        self._meanings: dict[int, QemuMeaning] = {}
        self._names: dict[int, str] = {}
        #: By number and length of the fields.
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._sources: dict[int, tuple[Source, QemuMeaning]] = {}
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
                position = self._alike(buffer, position, found)
                position = self._record(buffer, position, found)
                if not self._layouts:
                    position = self._mappings(buffer, position)
        except _NeedMoreError as need:
            position = need.args[0]
        finally:
            for layout in self._layouts.values():
                if layout.times:
                    self.counts.note(layout.name, layout.times)
                    layout.times = 0
        self._buffer = buffer[position:]
        self._offset += position

    def _alike(self, buffer: bytes, position: int, found: list[Event]) -> int:
        """Read records of layouts that were there before; return where another one begins."""
        counts, layouts, sources = self.counts, self._layouts, self._sources
        unpack, most = _EVENT.unpack_from, len(buffer) - _EVENT.size
        while position <= most:
            kind, number, time, length, process = unpack(buffer, position)
            layout = layouts.get((number, length))
            end = position + _TYPE.size + length
            source = sources.get(process)
            if layout is None or source is None or kind != RECORD_EVENT or end > len(buffer):
                break
            values = list(layout.unpack(buffer, position + _EVENT.size))
            if layout.string is not None and values.pop(-2) != layout.string:
                break
            guest, meaning = source
            line = counts.lines + 1
            form = layout.form
            try:
                meaning.translate(
                    layout.name, form, form.from_words(values), (time, guest, line, None), found
                )
            except UnreadableError:
                break
            counts.lines = line
            layout.times += 1
            position = end
        return position

    def _end(self, found: list[Event]) -> None:
        if self._buffer or not self._has_header:
            raise self.error(f"the trace ends in the middle of a record, at byte {self._offset:,}")

    def _record(self, buffer: bytes, position: int, found: list[Event]) -> int:
        """Read one record; return where the next begins."""
        (kind,), after = _unpack(_TYPE, buffer, position, position)
        if kind != RECORD_EVENT:
            return self._other_record(buffer, position, kind, after)
        (number, time, length, process), _ = _unpack(_RECORD, buffer, after, position)
        if not _RECORD.size <= length <= MAX_LINE:
            raise self._fail(f"a record of {length} bytes", position)
        body, end = position + _EVENT.size, position + _TYPE.size + length
        if end > len(buffer):
            raise _NeedMoreError(position)
        self.counts.lines += 1
        self._event(number, length, time, process, buffer[body:end], found)
        return end

    def _other_record(self, buffer: bytes, position: int, kind: int, after: int) -> int:
        if kind != RECORD_MAPPING:
            raise self._fail(f"record of type {kind:#x}, expected 0 or 1", position)
        return self._mapping(buffer, position, after)

    def _header(self, buffer: bytes) -> int:
        (number, magic, version), after = _unpack(_HEADER, buffer, 0, 0)
        if (number, magic) != (HEADER_ID, HEADER_MAGIC):
            raise self._fail("no trace of QEMU's `simple` backend", 0)
        if version != VERSION:
            raise self._fail(f"version {version} of the format, expected {VERSION}", 0)
        self._has_header = True
        return after

    def _mappings(self, buffer: bytes, position: int) -> int:
        """Read names behind each other; QEMU begins with those of all its events."""
        names, unpack, size = self._names, _NAMED.unpack_from, _NAMED.size
        most = len(buffer) - size
        room = _MOST_NAMES - len(names)
        while position <= most and room:
            kind, number, length = unpack(buffer, position)
            end = position + size + length
            if kind != RECORD_MAPPING or length > MAX_NAME or end > len(buffer):
                break
            names[number] = shorten(buffer[position + size : end])
            room -= 1
            position = end
        return position

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
            layout = self._layouts.pop(key)
            if layout.times:
                self.counts.note(layout.name, layout.times)
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
                self._remember(number, length, form, values)
                self._translate(number, time, process, form, form.from_words(values), body, found)
                return
        # Others than the versions of QEMU that are known write.
        self.counts.note_unreadable(line, name.encode())

    def _remember(self, number: int, length: int, form: Reading, values: list[Value]) -> None:
        """Keep the layout of an event's records of this length, where the length says all."""
        strings = [isinstance(value, bytes) for value in values]
        key = number, length
        if True in strings[:-1] or key in self._layouts:
            return
        if len(self._layouts) < _MOST_LAYOUTS:
            self._layouts[key] = _Layout(self._names[number], form, values)

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
        name, line = self._names[number], self.counts.lines
        source, meaning = self._guest_of(process)
        try:
            meaning.translate(name, form, values, (time, source, line, None), found)
        except UnreadableError:
            self.counts.note_unreadable(line, name.encode() + b" " + body[:MAX_NAME])
        else:
            self.counts.note(name)

    def _guest_of(self, process: int) -> tuple[Source, QemuMeaning]:
        guest = self._sources.get(process)
        if guest is None:
            source = self.guest(str(process))
            meaning = self._meanings.get(id(source))
            if meaning is None:
                meaning = QemuMeaning(self.virtio_mem_block_size, self.needs)
                self._meanings[id(source)] = meaning
            guest = source, meaning
            if len(self._sources) < MOST_SOURCES:
                self._sources[process] = guest
        return guest

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
