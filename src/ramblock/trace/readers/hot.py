# SPDX-License-Identifier: Apache-2.0
"""
The fast way: one pattern over a chunk for the lines that recordings mostly consist of.

A pattern here is narrower than what the careful way reads, and whatever it does not match goes that
way, in its place; so both give the same events (``tests/trace/test_hot.py``). One line costs 1 µs
here and 10 µs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from ramblock.trace.events import (
    Attributes,
    Conversion,
    Event,
    Map,
    Source,
    StateChange,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.readers.detect import format_of
from ramblock.trace.readers.qemu_meaning import CONVERSIONS, STATES, VFIO_USER, WRITABLE
from ramblock.trace.readers.text import TextReader

__all__ = ["FastTextReader"]

#: Lines that are read with care before it is decided which shapes to look for.
_TRIAL = 256
_MOST = 1 << 64
_H = rb"([0-9a-f]{1,16})"
_N = rb"(?:0|[1-9]\d{0,8})"
_TARGET = rb"  (iommufd=" + _N + rb" ioas=" + _N + rb") iova=0x" + _H + rb" size=0x" + _H

# Alternatives are told apart by their last group. Events that mean nothing have one group.
_QEMU = (
    rb"^(?:(\d{1,10})@(\d{1,11})\.(\d{6}):|(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{6})Z )?(?:"
    rb"iommufd_backend_map_(?:dma" + _TARGET + rb" addr=0x" + _H
    + rb" readonly=([01]) \((0|-[1-9]\d{0,5})\)"  # 6 to 11
    rb"|file_dma" + _TARGET + rb" fd=\d{1,9} start=\d{1,18} readonly=([01]) \((0|-[1-9]\d{0,5})\))"
    rb"|iommufd_backend_unmap_dma" + _TARGET + rb" \((0|-[1-9]\d{0,5})\)"  # 17 to 20
    rb"|vfio_user_dma_(?:map  iova 0x" + _H + rb" size 0x" + _H
    + rb" off 0x[0-9a-f]{1,16} flags 0x([0-9a-f]{1,8}) async_ops \d"  # 21 to 23
    rb"|unmap  iova 0x" + _H + rb" size 0x" + _H + rb" flags 0x[0-9a-f]{1,8} async_ops \d)"
    rb"|kvm_convert_memory start 0x" + _H + rb" size 0x" + _H
    + rb" (shared_to_private|private_to_shared)"  # 26 to 28
    rb"|ram_block_attributes_state_change offset 0x" + _H + rb" size 0x" + _H
    + rb" from '(?:discarded|populated|mixture)' to '(discarded|populated)'"  # 29 to 31
    rb"|(kvm_hc_map_gpa_range) gpa 0x[0-9a-f]{1,16} size 0x[0-9a-f]{1,16}"
    rb" attributes 0x[0-9a-f]{1,16} flags 0x[0-9a-f]{1,16}"
    rb"|(vfio_user_send_write)  id 0x[0-9a-f]{1,4} wrote 0x[0-9a-f]{1,8}"
    rb"|(vfio_user_recv_hdr)  \([\w/.@:-]{1,100}\) id 0x[0-9a-f]{1,4} cmd 0x[0-9a-f]{1,4}"
    rb" size 0x[0-9a-f]{1,8} flags 0x[0-9a-f]{1,8}"
    rb")\r?\n"
)  # fmt: skip
_MAP, _MAP_FILE, _UNMAP, _USER_MAP, _USER_UNMAP, _CONVERT, _STATE = 11, 16, 20, 23, 25, 28, 31
_QEMU_NAMES = {
    _MAP: "iommufd_backend_map_dma",
    _MAP_FILE: "iommufd_backend_map_file_dma",
    _UNMAP: "iommufd_backend_unmap_dma",
    _USER_MAP: "vfio_user_dma_map",
    _USER_UNMAP: "vfio_user_dma_unmap",
    _CONVERT: "kvm_convert_memory",
    _STATE: "ram_block_attributes_state_change",
    32: "kvm_hc_map_gpa_range",
    33: "vfio_user_send_write",
    34: "vfio_user_recv_hdr",
}

_X = rb"0x([0-9a-f]{1,16})"
_KERNEL = (
    rb"^([^\n:]{1,100} )(\d{1,11})\.(\d{6}(?:\d{3})?): {1,24}(?:iommu:|kvm:)?(?:"
    rb"map: {1,24}IOMMU: iova=" + _X + rb" - 0x[0-9a-f]{1,16} paddr=" + _X + rb" size=([1-9]\d{0,17})"
    rb"|unmap: {1,24}IOMMU: iova=" + _X + rb" - " + _X + rb" size=\d{1,18} unmapped_size=(\d{1,18})"
    rb"|kvm_vm_set_mem_attributes: {1,24}" + _X + rb" -- " + _X + rb" \[" + _X + rb"\]"
    rb"|kvm_hypercall: {1,24}nr 0xc a0 " + _X + rb" a1 0x([0-9a-f]{1,12}) a2 " + _X + rb"[^\n\w]?[^\n]*"
    rb"|(kvm_entry): [^\n]*"
    rb"|(kvm_exit|kvm_userspace_exit|kvm_page_fault|kvm_unmap_hva_range|dma_alloc|dma_free): [^\n]*"
    rb")\r?\n"
)  # fmt: skip
_IOMMU_MAP, _IOMMU_UNMAP, _ATTRIBUTES, _HYPERCALL, _ENTRY, _OTHER = 6, 9, 12, 15, 16, 17
_KERNEL_NAMES = {
    _IOMMU_MAP: "map",
    _IOMMU_UNMAP: "unmap",
    _ATTRIBUTES: "kvm_vm_set_mem_attributes",
    _HYPERCALL: "kvm_hypercall",
    _ENTRY: "kvm_entry",
}

_CALLS = (
    rb"^ramblock-vfio (map|unmap) (\d{1,19}) (\d{1,10}) \d{1,10} 0x" + _H + rb" 0x" + _H + rb" 0x"
    + _H + rb" (-?\d{1,10})(?: [\w./-]{0,24}){0,2}\r?\n"
)  # fmt: skip


@cache
def _pattern(style: str) -> re.Pattern[bytes]:
    text = {"qemu": _QEMU, "ftrace": _KERNEL, "bpftrace": _CALLS}[style]
    return re.compile(text, re.MULTILINE)


class FastTextReader(TextReader):
    """The reader of text; the same as its base, faster."""

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        #: The shapes to look for; None: not known yet.
        self._style: str | None = None
        self._threads: dict[bytes, str] = {}
        self._targets: dict[bytes, str] = {}

    def _block(self, block: bytes, found: list[Event]) -> None:
        position = 0
        if self._style is None:
            position = self._try_out(block, found)
            if position == len(block):
                return
        before = len(found)
        careful = 0
        for start, end in self._hot(block, position, found):
            careful += end - start
            super()._block(block[start:end], found)
        if careful > len(block) // 2 and len(found) > before:
            self._style = None  # it has become another kind of text

    def _try_out(self, block: bytes, found: list[Event]) -> int:
        """Read some lines with care, and decide on a style; return where to go on."""
        end = 0
        for _ in range(_TRIAL):
            end = block.find(b"\n", end) + 1
            if not end:
                end = len(block)
                break
        if end == len(block) and self.counts.lines < _TRIAL:
            super()._block(block, found)
            return end
        if self.counts.lines < _TRIAL:
            super()._block(block[:end], found)
        else:
            end = 0
        if not self.counts.by_name:
            super()._block(block[end:], found)
            return len(block)
        self._style = format_of(self.counts.by_name)
        return end

    def _hot(self, block: bytes, position: int, found: list[Event]) -> Iterator[tuple[int, int]]:
        """Read the hot lines; yield the spans of the others, each to be read when it comes."""
        if self._style == "qemu":
            return self._hot_qemu(block, position, found)
        if self._style == "ftrace":
            return self._hot_kernel(block, position, found)
        return self._hot_calls(block, position, found)

    def _hot_qemu(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        counts, heads, source = self.counts, self._heads, self.source
        meaning, _ = self._guest(source)
        threads, targets = self._threads, self._targets
        times = dict.fromkeys(_QEMU_NAMES, 0)
        append = found.append
        event: Event
        number = counts.lines
        for match in _pattern("qemu").finditer(block, position):
            start = match.start()
            if start != position:
                counts.lines = number
                yield position, start
                number = counts.lines
            position = match.end()
            number += 1
            kind = match.lastindex or 0
            if kind > _STATE:
                times[kind] += 1
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
                    if len(threads) > 4096:
                        threads.clear()
                    thread = threads[tid] = tid.decode()
            else:
                time = None
            if kind == _MAP or kind == _MAP_FILE:  # noqa: SIM109 - faster than a tuple
                if kind == _MAP:
                    name, address, length, host, readonly, result = match.group(6, 7, 8, 9, 10, 11)
                    place = int(host, 16)
                else:
                    name, address, length, readonly, result = match.group(12, 13, 14, 15, 16)
                    place = None
                address = int(address, 16)
                end = address + int(length, 16)
                target = targets.get(name) or self._target(name)
                event = Map(
                    time, source, number, target, address, end, readonly == b"0", result == b"0",
                    None, place,
                )  # fmt: skip
                meaning.map = event
            elif kind == _USER_MAP:
                address, length, flags = match.group(21, 22, 23)
                address = int(address, 16)
                end = address + int(length, 16)
                event = Map(
                    time, source, number, VFIO_USER, address, end, int(flags, 16) & WRITABLE != 0
                )
                meaning.map = event
            elif kind == _CONVERT:
                address, length, word = match.group(26, 27, 28)
                address = int(address, 16)
                end = address + int(length, 16)
                if end <= _MOST:
                    private = CONVERSIONS[word]
                    if self._telling:
                        self._flush(found)
                    conversion = Conversion(time, source, number, address, end, private, thread)
                    meaning.conversion = conversion
                    append(conversion)
                    event = Attributes(time, source, number, address, end, private, thread)
            elif kind == _STATE:
                address, length, word = match.group(29, 30, 31)
                address = int(address, 16)
                end = address + int(length, 16)
                event = StateChange(time, source, number, None, address, end, STATES[word])
            elif kind == _UNMAP:
                name, address, length, result = match.group(17, 18, 19, 20)
                address = int(address, 16)
                end = address + int(length, 16)
                target = targets.get(name) or self._target(name)
                event = Unmap(time, source, number, target, address, end, None, result == b"0")
                meaning.unmap = event
            else:
                address, length = match.group(24, 25)
                address = int(address, 16)
                end = address + int(length, 16)
                event = Unmap(time, source, number, VFIO_USER, address, end)
                meaning.unmap = event
            if end > _MOST:
                counts.lines = number - 1
                yield start, position
                continue
            times[kind] += 1
            if self._telling:
                self._flush(found)
            append(event)
        self._leave(number, {_QEMU_NAMES[kind]: count for kind, count in times.items()})
        if position != len(block):
            yield position, len(block)

    def _target(self, name: bytes) -> str:
        if len(self._targets) > 4096:
            self._targets.clear()
        target = self._targets[name] = name.decode()
        return target

    def _leave(self, number: int, times: dict[str, int]) -> None:
        self.counts.lines = number
        for name, count in times.items():
            if count:
                self.counts.note(name, count)

    def _hot_kernel(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        counts, tasks = self.counts, self._tasks
        times = dict.fromkeys(_KERNEL_NAMES, 0)
        others: dict[bytes, int] = {}
        append = found.append
        event: Event
        number = counts.lines
        for match in _pattern("ftrace").finditer(block, position):
            start = match.start()
            if start != position:
                counts.lines = number
                yield position, start
                number = counts.lines
            position = match.end()
            number += 1
            kind = match.lastindex or 0
            head, second, fraction = match.group(1, 2, 3)
            task = tasks.get(head)
            if task is None:
                task = self._task(head)
            if kind == _OTHER:
                name = match[kind]
                others[name] = others.get(name, 0) + 1
                continue
            scale = 1000 if len(fraction) == 6 else 1
            time = int(second) * 1_000_000_000 + int(fraction) * scale
            thread, target, source, has_process = task
            fits = True
            if kind == _ENTRY:
                fits = thread is not None
                event = VcpuEntry(time, source, number, thread or "")
            elif kind == _IOMMU_MAP:
                address, key, length = match.group(4, 5, 6)
                address = int(address, 16)
                end = address + int(length)
                fits = has_process and end <= _MOST  # else something is to be said
                event = Map(
                    time,
                    source,
                    number,
                    target,
                    address,
                    end,
                    True,
                    True,
                    int(key, 16),  # noqa: FBT003
                )
            elif kind == _IOMMU_UNMAP:
                address, last, length = match.group(7, 8, 9)
                address, end = int(address, 16), int(last, 16)
                fits = address <= end
                event = Unmap(time, source, number, target, address, end, int(length))
            elif kind == _ATTRIBUTES:
                first, last, bits = match.group(10, 11, 12)
                address, end = int(first, 16) << 12, int(last, 16) << 12
                fits = address <= end <= _MOST
                event = Attributes(
                    time, source, number, address, end, int(bits, 16) & 8 != 0, thread
                )
            else:
                first, pages, bits = match.group(13, 14, 15)
                address = int(first, 16)
                end = address + (int(pages, 16) << 12)
                fits = address < end <= _MOST
                event = Conversion(
                    time, source, number, address, end, int(bits, 16) & 16 != 0, thread
                )
            if not fits:
                counts.lines = number - 1
                yield start, position
                continue
            times[kind] += 1
            if self._telling:
                self._flush(found)
            append(event)
        self._leave(
            number,
            {_KERNEL_NAMES[kind]: count for kind, count in times.items()}
            | {name.decode(): count for name, count in others.items()},
        )
        if position != len(block):
            yield position, len(block)

    def _hot_calls(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        counts = self.counts
        sources: dict[bytes, tuple[Source, str]] = {}
        times = {b"map": 0, b"unmap": 0}
        append = found.append
        number = counts.lines
        for match in _pattern("bpftrace").finditer(block, position):
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
            if self._telling:
                self._flush(found)
            times[name] += 1
            worked = int(result) == 0
            if name == b"map":
                append(Map(int(time), source, number, target, address, end, done=worked))
            else:
                last = end if length else _MOST
                append(
                    Unmap(int(time), source, number, target, address, last, int(done, 16), worked)
                )
        self._leave(number, {f"type1 {name.decode()}": count for name, count in times.items()})
        if position != len(block):
            yield position, len(block)
