# SPDX-License-Identifier: Apache-2.0
"""The fast way through the lines of our bpftrace script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import repeat

from ramblock.trace.events import Event, Map, Source, Unmap
from ramblock.trace.readers.runs import NEAR, SHORTEST, decimals, find_run, hexadecimals, reach
from ramblock.trace.readers.text import TextReader

__all__ = ["HotCalls"]

_MOST = 1 << 64
_AHEAD, _NEWLINE = SHORTEST, 10
_H = rb"([0-9a-f]{1,16})"
_TEXT = (
    rb"^ramblock-vfio (map|unmap) (\d{1,19}) (\d{1,10}) \d{1,10} 0x" + _H + rb" 0x" + _H + rb" 0x"
    + _H + rb" (-?\d{1,10})(?: [\w./-]{0,24}){0,2}\r?\n"
)  # fmt: skip
_TIME, _ADDRESS = 2, 4


@cache
def _pattern() -> re.Pattern[bytes]:
    return re.compile(_TEXT, re.MULTILINE)


class HotCalls(TextReader):
    """The part of a reader that knows these lines."""

    def hot_calls(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        """Append events; yield the spans of other lines, each to be read when it comes."""
        counts = self.counts
        sources: dict[bytes, tuple[Source, str]] = {}
        times = {b"map": 0, b"unmap": 0}
        append = found.append
        number = counts.lines
        pattern = _pattern()
        most = NEAR
        going = True
        while going:
            going = False
            for match in pattern.finditer(block, position):
                start = match.start()
                if start != position:
                    counts.lines = number
                    yield position, start
                    number = counts.lines
                position = match.end()
                number += 1
                name, time, process, address, length, done, result = match.groups()
                address, length = int(address, 16), int(length, 16)
                end = address + length
                if end > _MOST:
                    counts.lines = number - 1
                    yield start, position
                    continue
                known = sources.get(process)
                if known is None:
                    text = process.decode()
                    known = sources[process] = self.guest(text), f"type1 of process {text}"
                source, target = known
                if self.telling:
                    self.flush(found)
                times[name] += 1
                worked = int(result) == 0
                if name != b"map":
                    last = end if length else _MOST
                    removed = int(done, 16)
                    append(Unmap(int(time), source, number, target, address, last, removed, worked))
                    continue
                first = Map(int(time), source, number, target, address, end, done=worked)
                append(first)
                if (
                    position + _AHEAD * (position - start) <= len(block)
                    and block[position + _AHEAD * (position - start) - 1] == _NEWLINE
                ):
                    alike = self._maps_behind(block, match, first, most, found)
                    most = reach(most, alike)
                    if alike:
                        times[name] += alike
                        number += alike
                        position += alike * (position - start)
                        going = True
                        break
        self.leave(number, {f"type1 {name.decode()}": count for name, count in times.items()})
        if position != len(block):
            yield position, len(block)

    def _maps_behind(
        self, block: bytes, match: re.Match[bytes], first: Map, most: int, found: list[Event]
    ) -> int:
        """Append the maps behind one that differ from it in time and place; return their number."""
        run = find_run(block, match, (_TIME, _ADDRESS), most)
        if run is None:
            return 0
        count, (stamps, places) = run
        times, starts = decimals(stamps), hexadecimals(places)
        size = first.end - first.start
        if times is None or starts is None or max(starts) + size > _MOST:
            return 0
        found += map(
            Map,
            times,
            repeat(first.source),
            range(first.line + 1, first.line + 1 + count),
            repeat(first.target),
            starts,
            [start + size for start in starts],
            repeat(first.writable),
            repeat(first.done),
        )
        return count
