# SPDX-License-Identifier: Apache-2.0
"""The fast way through QEMU's log, with ``-msg timestamp`` or without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import repeat

from ramblock.trace.events import (
    Attributes,
    Conversion,
    Event,
    Map,
    Source,
    StateChange,
    Unmap,
)
from ramblock.trace.readers.heads import Head
from ramblock.trace.readers.kernel import find_line
from ramblock.trace.readers.qemu_meaning import CONVERSIONS, STATES, VFIO_USER, WRITABLE
from ramblock.trace.readers.qemu_table import IGNORED
from ramblock.trace.readers.runs import NEAR, SHORTEST, decimals, find_run, hexadecimals, reach
from ramblock.trace.readers.text import TextReader, find_event

__all__ = ["HotQemu"]

_MOST = 1 << 64
_AHEAD, _NEWLINE = SHORTEST, 10
_MOST_NAMES = 4096
_H = rb"([0-9a-f]{1,16})"
_N = rb"(?:0|[1-9]\d{0,8})"
_TARGET = rb"  (iommufd=" + _N + rb" ioas=" + _N + rb") iova=0x" + _H + rb" size=0x" + _H

# Alternatives are told apart by their last group. Events that mean nothing have one group.
_TEXT = (
    rb"^(?:(\d{1,10})@(\d{1,11})\.(\d{6}):|(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{6})Z )?(?:"
    rb"iommufd_backend_map_(?:dma" + _TARGET + rb" addr=0x" + _H
    + rb" readonly=([01]) \((0|-[1-9]\d{0,5})\)"  # 6 to 11
    rb"|file_dma" + _TARGET + rb" fd=\d{1,9} start=(\d{1,18})"
    rb" readonly=([01]) \((0|-[1-9]\d{0,5})\))"  # 12 to 17
    rb"|iommufd_backend_unmap_dma" + _TARGET + rb" \((0|-[1-9]\d{0,5})\)"  # 18 to 21
    rb"|vfio_user_dma_(?:map  iova 0x" + _H + rb" size 0x" + _H
    + rb" off 0x" + _H + rb" flags 0x([0-9a-f]{1,8}) async_ops \d"  # 22 to 25
    rb"|unmap  iova 0x" + _H + rb" size 0x" + _H + rb" flags 0x[0-9a-f]{1,8} async_ops \d)"
    rb"|kvm_convert_memory start 0x" + _H + rb" size 0x" + _H
    + rb" (shared_to_private|private_to_shared)"  # 28 to 30
    rb"|ram_block_attributes_state_change offset 0x" + _H + rb" size 0x" + _H
    + rb" from '(?:discarded|populated|mixture)' to '(discarded|populated)'"  # 31 to 33
    rb"|(kvm_hc_map_gpa_range) gpa 0x[0-9a-f]{1,16} size 0x[0-9a-f]{1,16}"
    rb" attributes 0x[0-9a-f]{1,16} flags 0x[0-9a-f]{1,16}"
    rb"|(vfio_user_send_write)  id 0x[0-9a-f]{1,4} wrote 0x[0-9a-f]{1,8}"
    rb"|(vfio_user_recv_hdr)  \([\w/.@:-]{1,100}\) id 0x[0-9a-f]{1,4} cmd 0x[0-9a-f]{1,4}"
    rb" size 0x[0-9a-f]{1,8} flags 0x[0-9a-f]{1,8}"
    # Any other, whose text is the careful way's: but the head is known.
    rb"|((?:iommufd|kvm|ram_block|sev|tdx|vfio|virtio_mem)_\w{1,64})(?![^ \t\r\n])"
    rb"([^\n\r\\\x1b]*)"
    rb")\r?\n"
)  # fmt: skip
_MAP, _MAP_FILE, _UNMAP, _USER_MAP, _USER_UNMAP, _CONVERT, _STATE = 11, 17, 21, 25, 27, 30, 33
_NAME, _OTHER = 37, 38
_NAMES = {
    _MAP: "iommufd_backend_map_dma",
    _MAP_FILE: "iommufd_backend_map_file_dma",
    _UNMAP: "iommufd_backend_unmap_dma",
    _USER_MAP: "vfio_user_dma_map",
    _USER_UNMAP: "vfio_user_dma_unmap",
    _CONVERT: "kvm_convert_memory",
    _STATE: "ram_block_attributes_state_change",
    34: "kvm_hc_map_gpa_range",
    35: "vfio_user_send_write",
    36: "vfio_user_recv_hdr",
}
#: The group of a map's address, and that of a host address or an offset that goes with it.
_PLACES = {_MAP: (7, 9), _MAP_FILE: (13, 15), _USER_MAP: (22, 24)}


_IGNORED = frozenset(name.encode() for name in IGNORED)


def _is_odd(rest: bytes) -> bool:
    """Whether a line may be another's than QEMU's by what stands behind its name."""
    return b": " in rest or b"qemuPid" in rest or b"ramblock-vfio" in rest


def _is_qemus(raw: bytes) -> bool:
    """Whether such a line is QEMU's all the same."""
    return b"qemuPid" not in raw and b"ramblock-vfio" not in raw and find_line(raw) is None


@cache
def _pattern() -> re.Pattern[bytes]:
    return re.compile(_TEXT, re.MULTILINE)


class HotQemu(TextReader):
    """The part of a reader that knows these lines."""

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        self._threads: dict[bytes, str] = {}
        self._targets: dict[bytes, str] = {}

    def hot_qemu(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        """Append events; yield the spans of other lines, each to be read when it comes."""
        counts, heads, source = self.counts, self.heads, self.source
        meaning, _ = self.qemu_of(source)
        threads, targets = self._threads, self._targets
        times = dict.fromkeys(_NAMES, 0)
        others: dict[bytes, int] = {}
        append = found.append
        event: Event
        pattern = _pattern()
        number = counts.lines
        known: re.Match[bytes] | None = None
        raw = b""
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
                kind = match.lastindex or 0
                if kind > _STATE:
                    if kind != _OTHER:
                        times[kind] += 1
                        continue
                    name, rest = match.group(_NAME, _OTHER)
                    if name in _IGNORED and find_event(rest) is None and not _is_odd(rest):
                        others[name] = others.get(name, 0) + 1
                        continue
                    raw = block[start : match.end(_OTHER)]
                    known = find_event(raw, match.start(_NAME) - start)
                    if (
                        known is None
                        or known[1] != name
                        or name in _IGNORED
                        or (_is_odd(rest) and not _is_qemus(raw))
                    ):
                        counts.lines = number - 1
                        yield start, position
                        continue
                tid, second, micros, iso, fraction = match.group(1, 2, 3, 4, 5)
                time: int | None
                thread = None
                if iso is not None:
                    if (iso, b"Z") != heads.second:
                        heads.iso_second(iso, b"Z")
                    base = heads.second_ns
                    time = None if base is None else base + int(fraction) * 1000
                elif second is not None:
                    time = int(second) * 1_000_000_000 + int(micros) * 1000
                    thread = threads.get(tid)
                    if thread is None:
                        if len(threads) > _MOST_NAMES:
                            threads.clear()
                        thread = threads[tid] = tid.decode()
                else:
                    time = None
                if kind == _OTHER:
                    head = Head(time, None, thread, b"", fine=time is not None)
                    assert known is not None
                    self.qemu_events(raw, known, None, head, number, found)
                    continue
                if kind == _MAP or kind == _MAP_FILE:  # noqa: SIM109 - faster than a tuple
                    if kind == _MAP:
                        name, address, length, host, readonly, result = match.group(
                            6, 7, 8, 9, 10, 11
                        )
                        place = int(host, 16)
                    else:
                        name, address, length, readonly, result = match.group(12, 13, 14, 16, 17)
                        place = None
                    address = int(address, 16)
                    end = address + int(length, 16)
                    target = targets.get(name) or self._target_of(name)
                    event = Map(
                        time,
                        source,
                        number,
                        target,
                        address,
                        end,
                        readonly == b"0",
                        result == b"0",
                        None,
                        place,
                    )
                    meaning.map = event
                elif kind == _USER_MAP:
                    address, length, flags = match.group(22, 23, 25)
                    address = int(address, 16)
                    end = address + int(length, 16)
                    event = Map(
                        time,
                        source,
                        number,
                        VFIO_USER,
                        address,
                        end,
                        int(flags, 16) & WRITABLE != 0,
                    )
                    meaning.map = event
                elif kind == _CONVERT:
                    address, length, word = match.group(28, 29, 30)
                    address = int(address, 16)
                    end = address + int(length, 16)
                    if end <= _MOST:
                        private = CONVERSIONS[word]
                        if self.telling:
                            self.flush(found)
                        conversion = Conversion(time, source, number, address, end, private, thread)
                        meaning.conversion = conversion
                        append(conversion)
                        event = Attributes(time, source, number, address, end, private, thread)
                elif kind == _STATE:
                    address, length, word = match.group(31, 32, 33)
                    address = int(address, 16)
                    end = address + int(length, 16)
                    event = StateChange(time, source, number, None, address, end, STATES[word])
                elif kind == _UNMAP:
                    name, address, length, result = match.group(18, 19, 20, 21)
                    address = int(address, 16)
                    end = address + int(length, 16)
                    target = targets.get(name) or self._target_of(name)
                    event = Unmap(time, source, number, target, address, end, None, result == b"0")
                    meaning.unmap = event
                else:
                    address, length = match.group(26, 27)
                    address = int(address, 16)
                    end = address + int(length, 16)
                    event = Unmap(time, source, number, VFIO_USER, address, end)
                    meaning.unmap = event
                if end > _MOST:
                    counts.lines = number - 1
                    yield start, position
                    continue
                times[kind] += 1
                if self.telling:
                    self.flush(found)
                append(event)
                if (kind == _USER_MAP or kind == _MAP_FILE or kind == _MAP) and (  # noqa: SIM109
                    position + _AHEAD * (position - start) <= len(block)
                    and block[position + _AHEAD * (position - start) - 1] == _NEWLINE
                ):
                    alike = self._maps_alike(block, match, event, number, most, found)
                    most = reach(most, alike)
                    if alike:
                        times[kind] += alike
                        number += alike
                        position += alike * (position - start)
                        going = True
                        break
        for other, count in others.items():
            counts.note(other.decode(), count)
        self.leave(number, {_NAMES[kind]: count for kind, count in times.items()})
        if position != len(block):
            yield position, len(block)

    def _maps_alike(
        self,
        block: bytes,
        match: re.Match[bytes],
        first: Event,
        number: int,
        most: int,
        found: list[Event],
    ) -> int:
        """Append the maps behind one that differ from it in time and place; return their number."""
        kind = match.lastindex or 0
        assert isinstance(first, Map)
        place, with_it = _PLACES[kind]
        stamp = 3 if match[3] is not None else 5
        groups = (place, with_it) if first.time is None else (stamp, place, with_it)
        run = find_run(block, match, groups, most)
        if run is None:
            return 0
        count, columns = run
        starts = hexadecimals(columns[-2])
        others = decimals(columns[-1]) if kind == _MAP_FILE else hexadecimals(columns[-1])
        size = first.end - first.start
        if starts is None or others is None or max(starts) + size > _MOST:
            return 0
        times: Iterator[int | None] = repeat(None)
        if first.time is not None:
            micros = decimals(columns[0])
            if micros is None:
                return 0
            base = first.time - int(match[stamp]) * 1000
            times = iter([base + each * 1000 for each in micros])
        found += map(
            Map,
            times,
            repeat(first.source),
            range(number + 1, number + 1 + count),
            repeat(first.target),
            starts,
            [start + size for start in starts],
            repeat(first.writable),
            repeat(first.done),
            repeat(None),
            others if kind == _MAP else repeat(None),
        )
        newest = found[-1]
        assert isinstance(newest, Map)
        self.qemu_of(self.source)[0].map = newest
        return count

    def _target_of(self, name: bytes) -> str:
        if len(self._targets) > _MOST_NAMES:
            self._targets.clear()
        target = self._targets[name] = name.decode()
        return target
