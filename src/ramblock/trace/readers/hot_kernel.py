# SPDX-License-Identifier: Apache-2.0
"""The fast way through the kernel's events, as tracefs, trace-cmd and perf print them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import repeat

from ramblock.trace.events import Attributes, Conversion, Event, Map, Unmap, VcpuEntry
from ramblock.trace.readers.runs import NEAR, SHORTEST, decimals, find_run, hexadecimals, reach
from ramblock.trace.readers.text import TextReader

__all__ = ["HotKernel"]

_MOST = 1 << 64
_AHEAD, _NEWLINE = SHORTEST, 10
_X = rb"0x([0-9a-f]{1,16})"
_TEXT = (
    rb"^([^\n:]{1,100} )(\d{1,11})\.(\d{6}(?:\d{3})?): {1,24}(?:iommu:|kvm:)?(?:"
    rb"map: {1,24}IOMMU: iova=" + _X + rb" - " + _X + rb" paddr=" + _X
    + rb" size=([1-9]\d{0,17})"
    rb"|unmap: {1,24}IOMMU: iova=" + _X + rb" - " + _X + rb" size=\d{1,18} unmapped_size=(\d{1,18})"
    rb"|kvm_vm_set_mem_attributes: {1,24}" + _X + rb" -- " + _X + rb" \[" + _X + rb"\]"
    rb"|kvm_hypercall: {1,24}nr 0xc a0 " + _X + rb" a1 0x([0-9a-f]{1,12}) a2 " + _X
    + rb" [^\n]*"
    rb"|(kvm_entry): [^\n]*"
    rb"|(kvm_exit|kvm_userspace_exit|kvm_page_fault|kvm_unmap_hva_range|dma_alloc|dma_free): [^\n]*"
    rb")\r?\n"
)  # fmt: skip
_IOMMU_MAP, _IOMMU_UNMAP, _ATTRIBUTES, _HYPERCALL, _ENTRY, _OTHER = 7, 10, 13, 16, 17, 18
_NAMES = {
    _IOMMU_MAP: "map",
    _IOMMU_UNMAP: "unmap",
    _ATTRIBUTES: "kvm_vm_set_mem_attributes",
    _HYPERCALL: "kvm_hypercall",
    _ENTRY: "kvm_entry",
}
#: Those that come in runs, and the groups that differ.
_RUNS = {_IOMMU_MAP: (3, 4, 5, 6), _IOMMU_UNMAP: (3, 8, 9), _ENTRY: (3,)}


@cache
def _pattern() -> re.Pattern[bytes]:
    return re.compile(_TEXT, re.MULTILINE)


class HotKernel(TextReader):
    """The part of a reader that knows these lines."""

    def hot_kernel(
        self, block: bytes, position: int, found: list[Event]
    ) -> Iterator[tuple[int, int]]:
        """Append events; yield the spans of other lines, each to be read when it comes."""
        counts, tasks = self.counts, self.tasks
        times = dict.fromkeys(_NAMES, 0)
        others: dict[bytes, int] = {}
        append = found.append
        event: Event
        pattern = _pattern()
        number = counts.lines
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
                head, second, fraction = match.group(1, 2, 3)
                task = tasks.get(head)
                if task is None:
                    task = self.task_of(head)
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
                    address, key, length = match.group(4, 6, 7)
                    address = int(address, 16)
                    end = address + int(length)
                    fits = has_process and end <= _MOST  # else something is to be said
                    event = Map(time, source, number, target, address, end, key=int(key, 16))
                elif kind == _IOMMU_UNMAP:
                    address, last, length = match.group(8, 9, 10)
                    address, end = int(address, 16), int(last, 16)
                    fits = address <= end
                    event = Unmap(time, source, number, target, address, end, int(length))
                elif kind == _ATTRIBUTES:
                    first, last, bits = match.group(11, 12, 13)
                    address, end = int(first, 16) << 12, int(last, 16) << 12
                    fits = address <= end <= _MOST
                    event = Attributes(
                        time, source, number, address, end, int(bits, 16) & 8 != 0, thread
                    )
                else:
                    first, pages, bits = match.group(14, 15, 16)
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
                if self.telling:
                    self.flush(found)
                append(event)
                if kind in _RUNS and (
                    position + _AHEAD * (position - start) <= len(block)
                    and block[position + _AHEAD * (position - start) - 1] == _NEWLINE
                ):
                    alike = self._calls_alike(block, match, event, number, most, found)
                    most = reach(most, alike)
                    if alike:
                        times[kind] += alike
                        number += alike
                        position += alike * (position - start)
                        going = True
                        break
        self.leave(
            number,
            {_NAMES[kind]: count for kind, count in times.items()}
            | {name.decode(): count for name, count in others.items()},
        )
        if position != len(block):
            yield position, len(block)

    def _calls_alike(
        self,
        block: bytes,
        match: re.Match[bytes],
        first: Event,
        number: int,
        most: int,
        found: list[Event],
    ) -> int:
        """Append the events behind one that differ from it in time and place; return how many."""
        kind = match.lastindex or 0
        run = find_run(
            block,
            match,
            _RUNS[kind],
            most,
            free_from=match.end(kind) + 2 if kind == _ENTRY else None,
        )
        if run is None:
            return 0
        count, (fractions, *columns) = run
        parts = decimals(fractions)
        if parts is None or first.time is None:
            return 0
        scale = 1000 if len(match[3]) == 6 else 1
        base = first.time - int(match[3]) * scale
        times = [base + each * scale for each in parts]
        lines = range(number + 1, number + 1 + count)
        numbers = [hexadecimals(column) for column in columns]
        if None in numbers:
            return 0
        if isinstance(first, VcpuEntry):
            found += map(VcpuEntry, times, repeat(first.source), lines, repeat(first.vcpu))
            return count
        starts = numbers[0]
        assert starts is not None
        if isinstance(first, Map):
            size = first.end - first.start
            ends = [start + size for start in starts]
            if max(ends) > _MOST:
                return 0
            keys = numbers[2]
            assert keys is not None
            found += map(
                Map,
                times,
                repeat(first.source),
                lines,
                repeat(first.target),
                starts,
                ends,
                repeat(first.writable),
                repeat(first.done),
                keys,
            )
            return count
        assert isinstance(first, Unmap)
        lasts = numbers[1]
        assert lasts is not None
        if any(start > last for start, last in zip(starts, lasts, strict=True)):
            return 0
        found += map(
            Unmap,
            times,
            repeat(first.source),
            lines,
            repeat(first.target),
            starts,
            lasts,
            repeat(first.unmapped),
        )
        return count
