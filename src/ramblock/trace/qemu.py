# SPDX-License-Identifier: Apache-2.0
"""Reads QEMU's text trace (its ``log`` backend): ``name arguments``, perhaps after a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Remark, Source
from ramblock.trace.qemu_events import QemuEvents
from ramblock.trace.qemu_formats import FORMATS, IGNORED
from ramblock.trace.reader import LineReader

__all__ = ["QemuReader"]

# `-msg timestamp=on` gives the first kind of time; older versions wrote the second whether asked or
# not.
_LINE = re.compile(
    rb"(?:(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{6})Z |\d+@(\d{1,12})\.(\d{6}):)?"
    rb"([a-z][a-z0-9_]*)(?: (.*?))?\r?",
    re.DOTALL,
)
#: QEMU's report of a call that failed (hw/vfio/listener.c, container.c): object, address and size
#: in hex, and -errno.
_FAILURE = re.compile(
    rb"vfio\w*_dma_(un)?map\([^,()]*, (0x[0-9a-fA-F]+), (0x[0-9a-fA-F]+)[^()]*\) = (-\d+)"
)
_ISO = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{6})Z ")


class QemuReader(LineReader):
    """
    A parser of QEMU's text trace.

    Lines that are no trace events are counted, since the log may have others.

    An event with a word that is none of QEMU's ends the reading.

    :param virtio_mem_block_size: Bytes; the ``block-size`` of the guest's virtio-mem device.
    """

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source)
        self._events = QemuEvents(source, virtio_mem_block_size)
        self._error: TraceError | None = None
        self._second = b""
        self._second_ns = 0

    @property
    def needs(self) -> dict[str, str]:
        """Further sources that would tell more, by a keyword."""
        return self._events.needs

    def feed(self, data: bytes) -> list[Event]:
        """
        Take bytes; return the events of the lines that are complete.

        :raises TraceError: A line before these bytes could not be read.
        """
        if self._error is not None:
            raise self._error
        return super().feed(data)

    def finish(self) -> list[Event]:
        """
        Take the end of the input; a last line without its end counts like any other.

        :raises TraceError: A line could not be read.
        """
        if self._error is not None:
            raise self._error
        found = super().finish()
        if self._error is not None:
            raise self._error
        return found

    def _parse(self, lines: list[bytes]) -> list[Event]:
        found: list[Event] = []
        counts = self.counts
        by_name = counts.by_name
        number = counts.lines
        for raw in lines:
            number += 1
            match = _LINE.fullmatch(raw)
            name = "" if match is None else match[5].decode()
            known = FORMATS.get(name)
            values = None
            if known is not None and match is not None:
                values = known.from_text(match[6] or b"")
            if values is not None and match is not None:
                try:
                    found += self._events.translate(name, self._time(match), number, values)
                except TraceError as error:
                    self._error = error
                    break
                by_name[name] = by_name.get(name, 0) + 1
            elif name in IGNORED:
                by_name[name] = by_name.get(name, 0) + 1
            elif raw.strip():
                self._other(raw, number, found)
        counts.lines = number
        counts.events += len(found)
        return found

    def _time(self, match: re.Match[bytes]) -> int | None:
        second, micros, old_second, old_micros, *_ = match.groups()
        if second is not None:
            return self._iso(second, micros)
        if old_second is not None:
            return int(old_second) * 10**9 + int(old_micros) * 1000
        return None

    def _iso(self, second: bytes, micros: bytes) -> int:
        if second != self._second:
            try:
                moment = datetime.fromisoformat(second.decode()).replace(tzinfo=UTC)
            except ValueError:  # the 99th of a month
                return self._second_ns
            self._second, self._second_ns = second, int(moment.timestamp()) * 10**9
        return self._second_ns + int(micros) * 1000

    def _other(self, raw: bytes, number: int, found: list[Event]) -> None:
        """Look whether a line is QEMU's word for a mapping that failed."""
        failure = _FAILURE.search(raw)
        if failure is None:
            self.counts.note_unknown(number, raw)
            return
        is_unmap = failure[1] is not None
        start, size = int(failure[2], 16), int(failure[3], 16)
        time = _ISO.match(raw)
        found.append(
            Remark(
                None if time is None else self._iso(time[1], time[2]),
                self.source,
                number,
                "unmap failed" if is_unmap else "map failed",
                f"QEMU says: {failure[0].decode(errors='replace')}",
                self._events.last_target,
                start,
                start + size,
                stale=is_unmap,
            )
        )
