# SPDX-License-Identifier: Apache-2.0
"""
Reads the lines of our bpftrace script on VFIO type1 (``ramblock check --how bpftrace``).

A line for each call that has returned:

    ramblock-vfio map|unmap TIME_NS PID TID IOVA SIZE DONE_BYTES RESULT COMMAND
"""

from __future__ import annotations

import re

from ramblock.trace.events import Event, Map, Remark, Unmap
from ramblock.trace.reader import LineReader

__all__ = ["BpftraceReader"]

_LINE = re.compile(
    rb"ramblock-vfio (map|unmap) (\d{1,20}) (\d+) \d+"
    rb" 0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) (-?\d+)(?: .*)?\r?",
    re.DOTALL,
)
_LOST = re.compile(rb"Lost \d+ events")
#: Lines of bpftrace itself when it begins.
_CHATTER = re.compile(rb"Attach(?:ed|ing) .*|\s*")
_EVERYTHING = 1 << 64


class BpftraceReader(LineReader):
    """A parser of these lines; others are counted."""

    def _parse(self, lines: list[bytes]) -> list[Event]:
        found: list[Event] = []
        counts = self.counts
        for raw in lines:
            counts.lines += 1
            match = _LINE.fullmatch(raw)
            if match is not None:
                found.append(self._event(match, counts.lines))
                name = match[1].decode()
                counts.by_name[name] = counts.by_name.get(name, 0) + 1
            elif _LOST.match(raw):
                text = raw.decode(errors="replace")
                found.append(Remark(None, self.source, counts.lines, "lost", text, lost=True))
            elif _CHATTER.fullmatch(raw) is None:
                counts.note_unknown(counts.lines, raw)
        counts.events += len(found)
        return found

    def _event(self, match: re.Match[bytes], line: int) -> Event:
        time, process = int(match[2]), match[3].decode()
        start, size, done = (int(group, 16) for group in match.group(4, 5, 6))
        worked = int(match[7]) == 0
        target = f"type1 of process {process}"
        if match[1] == b"map":
            return Map(time, self.source, line, target, start, start + size, done=worked)
        # VFIO_DMA_UNMAP_FLAG_ALL names address and size 0.
        end = start + size if size else _EVERYTHING
        return Unmap(time, self.source, line, target, start, end, done, done=worked)
