# SPDX-License-Identifier: Apache-2.0
"""Reads our own format (docs/trace-format.rst), from ``ramblock run`` and ``ramblock probe``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from ramblock.errors import TraceError
from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Block,
    ConversionEnd,
    Detach,
    Discard,
    Event,
    Layout,
    Map,
    Remark,
    Source,
    StateChange,
    Unmap,
)
from ramblock.trace.own_events import (
    AnyLine,
    OwnAttributes,
    OwnConnect,
    OwnConversion,
    OwnDetach,
    OwnDisconnect,
    OwnFault,
    OwnFree,
    OwnMap,
    OwnReset,
    OwnStale,
    OwnStateChange,
    OwnUnmap,
    OwnViolation,
    Start,
)
from ramblock.trace.reader import MAX_LINE, ReadCounts
from ramblock.trace.writer import TRACE_VERSION

__all__ = ["OwnReader"]

_NAMES: dict[type[Any], str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(AnyLine)}
_EVERYTHING = 1 << 64


class _AnyEvent(msgspec.Struct):
    event: str


class OwnReader:
    """
    A parser of our own JSON lines; bytes in, events out.

    Events that it does not know are counted, as the format asks of readers. A line that is no JSON,
    or lacks a field of its event, is an error: our own programs do not write such.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.counts = ReadCounts()
        self._tail = b""
        self._line = 0
        self._decoder = msgspec.json.Decoder(AnyLine)
        self._event_name = msgspec.json.Decoder(_AnyEvent)
        self._make: dict[type[Any], Callable[[Any, int], Event | None]] = {
            Start: self._start,
            OwnAttributes: self._attributes,
            OwnMap: self._map,
            OwnUnmap: self._unmap,
            OwnFault: self._fault,
            OwnFree: self._free,
            OwnStateChange: self._state_change,
            OwnConversion: self._conversion,
            OwnReset: self._reset,
            OwnConnect: self._connect,
            OwnDetach: self._detach,
            OwnDisconnect: self._detach,
            OwnViolation: self._violation,
            OwnStale: self._stale,
        }
        self._error: TraceError | None = None

    def feed(self, data: bytes) -> list[Event]:
        """
        Take bytes; return the events of the lines that are complete.

        A line that cannot be read ends the reading: the events before it are returned, and the next
        call raises.

        :raises TraceError: A line before these bytes could not be read.
        """
        if self._error is not None:
            raise self._error
        data = self._tail + data
        end = data.rfind(b"\n") + 1
        self._tail = data[end:]
        found = self._events(data[:end]) if end else []
        if len(self._tail) > MAX_LINE and self._error is None:
            self._fail(f"the line is longer than {MAX_LINE >> 20} MiB")
            self._tail = b""
        return found

    def finish(self) -> list[Event]:
        """
        Take the end of the input; return the events of a last line that has no newline.

        :raises TraceError: A line could not be read, or the last line is cut.
        """
        if self._error is not None:
            raise self._error
        tail, self._tail = self._tail, b""
        if not tail.strip():
            return []
        found = self._events(tail + b"\n")
        if self._error is not None:
            raise TraceError(
                f"{self.source.name}:{self._line + 1}: the last line is cut",
                path=self.source.name,
                line=self._line + 1,
            ) from self._error
        return found

    def _fail(self, text: str, line: int | None = None) -> None:
        line = self._line + 1 if line is None else line
        self._error = TraceError(
            f"{self.source.name}:{line}: {text}", path=self.source.name, line=line
        )

    def _events(self, block: bytes) -> list[Event]:
        try:
            lines: list[Any] = self._decoder.decode_lines(block)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self._events_one_by_one(block)
        if len(lines) != block.count(b"\n"):  # empty lines, which decode_lines skips
            return self._events_one_by_one(block)
        return self._convert(lines)

    def _events_one_by_one(self, block: bytes) -> list[Event]:
        """Find the odd part, the slow way."""
        found: list[Event] = []
        for raw in block.split(b"\n")[:-1]:
            if not raw.strip():
                self._skip()
                continue
            try:
                line: Any = self._decoder.decode(raw)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                if not self._is_unknown_event(raw):
                    self._fail(f"not a line of a ramblock trace: {error}")
                    return found
                self._skip()
                self.counts.note_unknown(self._line, raw)
                continue
            found += self._convert([line])
            if self._error is not None:
                return found
        return found

    def _skip(self) -> None:
        self._line += 1
        self.counts.lines += 1

    def _is_unknown_event(self, raw: bytes) -> bool:
        try:
            return self._event_name.decode(raw).event not in _NAMES.values()
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return False

    def _convert(self, lines: list[Any]) -> list[Event]:
        make = self._make
        number = self._line
        found = []
        for line in lines:
            number += 1
            maker = make.get(type(line))
            if maker is not None:
                event = maker(line, number)
                if event is not None:
                    found.append(event)
                elif self._error is not None:
                    break
        self._line = number
        counts = self.counts
        counts.lines += len(lines)
        counts.events += len(found)
        for kind, times in Counter(map(type, lines)).items():
            name = _NAMES[kind]
            counts.by_name[name] = counts.by_name.get(name, 0) + times
        return found

    def _start(self, line: Start, number: int) -> Event | None:
        if line.version != TRACE_VERSION:
            self._fail(f"version {line.version} of the format, expected {TRACE_VERSION}", number)
            return None
        blocks = tuple(
            Block(
                name=block.name,
                start=block.gpa,
                end=block.gpa + block.size,
                confidential=block.confidential,
            )
            for block in line.blocks
        )
        # A run tells each conversion's end, and makes them one after the other; a probe knows of no
        # conversions.
        return Layout(
            time=line.t,
            source=self.source,
            line=number,
            blocks=blocks,
            targets=tuple(line.targets),
            # A probe refuses an inexact unmap by itself: its `violation` and `stale` events say so.
            unmap=None,
            ends=bool(blocks),
        )

    def _attributes(self, line: OwnAttributes, number: int) -> Event:
        return Attributes(line.t, self.source, number, line.gpa, line.gpa + line.size, line.private)

    def _map(self, line: OwnMap, number: int) -> Event:
        return Map(
            line.t,
            self.source,
            number,
            line.target,
            line.iova,
            line.iova + line.size,
            line.writable,
        )

    def _unmap(self, line: OwnUnmap, number: int) -> Event:
        # A vfio-user client may unmap everything at once, with address and size 0.
        end = line.iova + line.size if line.size else _EVERYTHING
        return Unmap(line.t, self.source, number, line.target, line.iova, end, line.unmapped)

    def _fault(self, line: OwnFault, number: int) -> Event:
        return Access(
            line.t,
            self.source,
            number,
            line.target,
            line.iova,
            line.iova + line.size,
            line.write,
            refused=True,
        )

    def _free(self, line: OwnFree, number: int) -> Event:
        return Discard(
            line.t,
            self.source,
            number,
            line.gpa,
            line.gpa + line.size,
            shared=line.side == "shared",
        )

    def _state_change(self, line: OwnStateChange, number: int) -> Event:
        return StateChange(
            line.t,
            self.source,
            number,
            line.block,
            line.offset,
            line.offset + line.size,
            line.after == "private",
        )

    def _conversion(self, line: OwnConversion, number: int) -> Event:
        gpa, size = line.gpa, line.size
        if not isinstance(gpa, int) or not isinstance(size, int) or gpa < 0 or size < 0:
            gpa = size = (
                0  # a request that could not be meant: it was refused, and ended all the same
            )
        return ConversionEnd(
            line.t,
            self.source,
            number,
            gpa,
            gpa + size,
            line.to == "private",
            line.t - line.took,
            line.result,
        )

    def _reset(self, line: OwnReset, number: int) -> Event:
        # Whatever it unmapped and made private is over with it, as with a conversion of no range.
        began = line.t - line.took
        return ConversionEnd(
            line.t, self.source, number, 0, 0, private=True, began=began, result=line.result
        )

    def _connect(self, line: OwnConnect, number: int) -> Event:
        return Attach(line.t, self.source, number, line.target)

    def _detach(self, line: OwnDetach | OwnDisconnect, number: int) -> Event:
        return Detach(line.t, self.source, number, line.target)

    def _violation(self, line: OwnViolation, number: int) -> Event:
        iova, size = line.iova, line.size
        return Remark(
            line.t,
            self.source,
            number,
            line.rule,
            line.reason,
            line.target,
            iova,
            None if iova is None or size is None else iova + size,
        )

    def _stale(self, line: OwnStale, number: int) -> Event:
        end = line.unmap_iova + line.unmap_size
        return Remark(
            line.t,
            self.source,
            number,
            "stale",
            f"the unmap of [{line.unmap_iova:#x}, {end:#x}) was refused, and this window stayed",
            line.target,
            line.iova,
            line.iova + line.size,
            stale=True,
        )
