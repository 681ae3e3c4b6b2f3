# SPDX-License-Identifier: Apache-2.0
"""Reads our own format (docs/trace-format.rst), from ``ramblock run`` and ``ramblock probe``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, get_args

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
from ramblock.trace.readers.base import MAX_LINE, MAX_NAME, MOST_SOURCES, TraceReader
from ramblock.trace.readers.own_lines import (
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
from ramblock.trace.readers.registry import register
from ramblock.trace.writer import TRACE_VERSION

__all__ = ["OwnReader"]

_NAMES: dict[type[Any], str] = {kind: str(kind.__struct_config__.tag) for kind in get_args(AnyLine)}
_EVERYTHING = 1 << 64
#: msgspec bounds nesting by the interpreter's limit of recursion.
_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _RefusedError(Exception):
    """A line that is of the format, and cannot be meant."""


_F = TypeVar("_F", bound=Callable[..., Event])
_MAKERS: dict[type[Any], Callable[..., Event]] = {}


def _makes(*kinds: type[Any]) -> Callable[[_F], _F]:
    """Say which lines a method makes an event of."""

    def decorate(function: _F) -> _F:
        _MAKERS.update(dict.fromkeys(kinds, function))
        return function

    return decorate


class _AnyEvent(msgspec.Struct):
    event: str


@register("ramblock")
class OwnReader(TraceReader):
    """
    A parser of our own JSON lines.

    Events that it does not know are counted, as the format asks of readers. A line that is no JSON,
    or lacks a field of its event, is an error: our own programs do not write such.
    """

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        self._tail = b""
        self._names: dict[str, str] = {}
        self._decoder = msgspec.json.Decoder(AnyLine)
        self._event_name = msgspec.json.Decoder(_AnyEvent)

    def _take(self, data: bytes, found: list[Event]) -> None:
        end = data.rfind(b"\n") + 1
        if not end:
            self._tail += data
        else:
            block = self._tail + data[:end]
            self._tail = data[end:]
            self._events(block, found)
        if len(self._tail) > MAX_LINE:
            self._tail = b""
            raise self.error(f"the line is longer than {MAX_LINE >> 20} MiB")

    def _end(self, found: list[Event]) -> None:
        tail, self._tail = self._tail, b""
        if not tail.strip():
            return
        line = self.counts.lines + 1
        try:
            self._events(tail + b"\n", found)
        except TraceError as error:
            raise self.error("the last line is cut", line) from error

    def _events(self, block: bytes, found: list[Event]) -> None:
        try:
            lines: list[Any] = self._decoder.decode_lines(block)
        except _NOT_READ:
            self._events_one_by_one(block, found)
            return
        if len(lines) != block.count(b"\n"):  # empty lines, which decode_lines skips
            self._events_one_by_one(block, found)
        else:
            self._convert(lines, found)

    def _events_one_by_one(self, block: bytes, found: list[Event]) -> None:
        """Find the odd part, the slow way."""
        for raw in block.split(b"\n")[:-1]:
            if not raw.strip():
                self.counts.lines += 1
                continue
            try:
                line: Any = self._decoder.decode(raw)
            except _NOT_READ as error:
                if not self._is_unknown_event(raw):
                    raise self.error(f"not a line of a ramblock trace: {error}") from error
                self.counts.lines += 1
                self.counts.note_unknown(self.counts.lines, raw)
                continue
            self._convert([line], found)

    def _is_unknown_event(self, raw: bytes) -> bool:
        try:
            return self._event_name.decode(raw).event not in _NAMES.values()
        except _NOT_READ:
            return False

    def _convert(self, lines: list[Any], found: list[Event]) -> None:
        counts = self.counts
        number = counts.lines
        append = found.append
        try:
            for line in lines:
                number += 1
                maker = _MAKERS.get(type(line))
                if maker is not None:
                    append(maker(self, line, number))
        except _RefusedError as error:
            counts.lines = number - 1
            raise self.error(str(error)) from None
        counts.lines = number
        for kind, times in Counter(map(type, lines)).items():
            counts.note(_NAMES[kind], times)

    def _name(self, name: str) -> str:
        """Return the one copy of a name that all events share."""
        if len(self._names) >= MOST_SOURCES:
            raise _RefusedError(f"more than {MOST_SOURCES:,} names of targets and blocks")
        if len(name) > MAX_NAME:
            raise _RefusedError(f"a name of {len(name):,} characters, expected at most {MAX_NAME}")
        return self._names.setdefault(name, name)

    @_makes(Start)
    def _start(self, line: Start, number: int) -> Event:
        if line.version != TRACE_VERSION:
            raise _RefusedError(f"version {line.version} of the format, expected {TRACE_VERSION}")
        blocks = tuple(
            Block(
                name=self._name(block.name),
                start=block.gpa,
                end=_end(block.gpa, block.size),
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
            targets=tuple(map(self._name, line.targets)),
            # A probe refuses an inexact unmap by itself: its `violation` and `stale` events say so.
            unmap=None,
            ends=bool(blocks),
        )

    @_makes(OwnAttributes)
    def _attributes(self, line: OwnAttributes, number: int) -> Event:
        gpa = line.gpa
        end = gpa + line.size
        if end > _EVERYTHING:  # written out where most events are: a call costs as much as the rest
            raise _too_far(gpa, end)
        return Attributes(line.t, self.source, number, gpa, end, line.private)

    @_makes(OwnMap)
    def _map(self, line: OwnMap, number: int) -> Event:
        iova = line.iova
        end = iova + line.size
        if end > _EVERYTHING:
            raise _too_far(iova, end)
        target = self._names.get(line.target) or self._name(line.target)
        return Map(line.t, self.source, number, target, iova, end, line.writable)

    @_makes(OwnUnmap)
    def _unmap(self, line: OwnUnmap, number: int) -> Event:
        # A vfio-user client may unmap everything at once, with address and size 0.
        iova = line.iova
        end = iova + line.size if line.size else _EVERYTHING
        if end > _EVERYTHING:
            raise _too_far(iova, end)
        target = self._names.get(line.target) or self._name(line.target)
        return Unmap(line.t, self.source, number, target, iova, end, line.unmapped)

    @_makes(OwnFault)
    def _fault(self, line: OwnFault, number: int) -> Event:
        return Access(
            line.t,
            self.source,
            number,
            self._names.get(line.target) or self._name(line.target),
            line.iova,
            _end(line.iova, line.size),
            line.write,
            refused=True,
        )

    @_makes(OwnFree)
    def _free(self, line: OwnFree, number: int) -> Event:
        return Discard(
            line.t,
            self.source,
            number,
            line.gpa,
            _end(line.gpa, line.size),
            shared=line.side == "shared",
        )

    @_makes(OwnStateChange)
    def _state_change(self, line: OwnStateChange, number: int) -> Event:
        return StateChange(
            line.t,
            self.source,
            number,
            self._names.get(line.block) or self._name(line.block),
            line.offset,
            _end(line.offset, line.size),
            line.after == "private",
        )

    @_makes(OwnConversion)
    def _conversion(self, line: OwnConversion, number: int) -> Event:
        gpa, size = line.gpa, line.size
        # A request that could not be meant was refused, and ended all the same.
        if (
            not isinstance(gpa, int)
            or not isinstance(size, int)
            or gpa < 0
            or size < 0
            or gpa + size > _EVERYTHING
        ):
            gpa = size = 0
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

    @_makes(OwnReset)
    def _reset(self, line: OwnReset, number: int) -> Event:
        # Whatever it unmapped and made private is over with it, as with a conversion of no range.
        began = line.t - line.took
        return ConversionEnd(
            line.t, self.source, number, 0, 0, private=True, began=began, result=line.result
        )

    @_makes(OwnConnect)
    def _connect(self, line: OwnConnect, number: int) -> Event:
        return Attach(
            line.t, self.source, number, self._names.get(line.target) or self._name(line.target)
        )

    @_makes(OwnDetach, OwnDisconnect)
    def _detach(self, line: OwnDetach | OwnDisconnect, number: int) -> Event:
        return Detach(
            line.t, self.source, number, self._names.get(line.target) or self._name(line.target)
        )

    @_makes(OwnViolation)
    def _violation(self, line: OwnViolation, number: int) -> Event:
        iova, size = line.iova, line.size
        return Remark(
            line.t,
            self.source,
            number,
            line.rule[:MAX_NAME],
            line.reason[:MAX_NAME],
            self._names.get(line.target) or self._name(line.target),
            iova,
            None if iova is None or size is None else _end(iova, size),
        )

    @_makes(OwnStale)
    def _stale(self, line: OwnStale, number: int) -> Event:
        end = _end(line.unmap_iova, line.unmap_size)
        return Remark(
            line.t,
            self.source,
            number,
            "stale",
            f"the unmap of [{line.unmap_iova:#x}, {end:#x}) was refused, and this window stayed",
            self._names.get(line.target) or self._name(line.target),
            line.iova,
            _end(line.iova, line.size),
            stale=True,
        )


def _end(start: int, size: int) -> int:
    end = start + size
    if end > _EVERYTHING:
        raise _too_far(start, end)
    return end


def _too_far(start: int, end: int) -> _RefusedError:
    return _RefusedError(f"the range [{start:#x}, {end:#x}) ends beyond 64 bits")
