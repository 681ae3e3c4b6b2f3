# SPDX-License-Identifier: Apache-2.0
"""
The kernel's tracepoints as lines: tracefs, ``trace-cmd report``, ``perf script``, ``perf trace``.

The texts are those of trace/events/iommu.h and kvm.h, and arch/x86/kvm/trace.h; ``trace-cmd report
-R`` and ``perf trace`` print fields instead. ``iommu:map`` names neither domain nor device, so one
process is taken for one target; type1 maps everything once for each domain of its container, which
shows as the same event again. ``kvm_vm_set_mem_attributes`` is written at entry, so for calls that
fail too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ramblock.trace.events import (
    Access,
    Attach,
    Attributes,
    Conversion,
    Event,
    Map,
    Source,
    Unmap,
    VcpuEntry,
)
from ramblock.trace.readers.base import MAX_NAME
from ramblock.trace.readers.qemu_meaning import UnreadableError, end_of

__all__ = ["FAULTS", "IGNORED", "KernelEvents", "KernelLine", "Task", "find_line", "find_task"]

#: The target in whose name faults are told: an IOMMU does not say whose mapping was missing.
FAULTS = "faults"
#: Known, and of no meaning here.
IGNORED = frozenset(
    {
        b"add_device_to_group",
        b"remove_device_from_group",
        b"detach_device_from_domain",
        b"kvm_exit",
        b"kvm_userspace_exit",
        b"kvm_page_fault",
        b"kvm_unmap_hva_range",
        b"kvm_vmgexit_enter",
        b"kvm_vmgexit_exit",
        b"kvm_vmgexit_msr_protocol_enter",
        b"kvm_vmgexit_msr_protocol_exit",
        b"kvm_rmp_fault",
        b"swiotlb_bounced",
        b"dma_alloc",
        b"dma_free",
        b"dma_map_phys",
        b"dma_unmap_phys",
        b"dma_map_page",
        b"dma_unmap_page",
    }
)
#: Written by somebody through tracefs; QEMU's `ftrace` backend does.
_MARKERS = (b"tracing_mark_write", b"print")

_PRIVATE = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE
_MAP_GPA_RANGE = 12  # KVM_HC_MAP_GPA_RANGE
_ENCRYPTED = 1 << 4  # KVM_MAP_GPA_RANGE_ENCRYPTED
_FAULT_WRITE = 1  # IOMMU_FAULT_WRITE
PAGE_SHIFT = 12

# The time, perhaps with the difference to the one before (trace-cmd --ts-diff), perhaps the
# subsystem (perf), the event, its text. A clock of the kernel may count in ticks, and the latency
# format has microseconds with a mark for a long delay.
_LINE = re.compile(
    rb"(?<![^\s])(\d{1,20})(?:\.(\d{9}|\d{6}))?(us)?[!+#*@$ ]?(?: ?\(\+?-?\d{1,20}\))?:"
    rb"\s{1,80}(?:\(\+?-?\d{1,20}\)\s{1,20})?(?:\w{1,32}:)?(\w{1,64}):\s{0,40}"
)
_PERF_TRACE = re.compile(
    rb"\s{0,40}(\d{1,12})\.(\d{3}) (?:\( {0,20}[\d.]{0,20} {0,4}(?:ms)? {0,4}\):? )?"
    rb"([^\n]{1,64}?)/(\d{1,10}) (?:iommu|kvm):(\w{1,64})\(([^\n]{0,400})\)"
)
# `comm-tid`, perhaps with `( tgid)`, the processor and flags: ftrace. In the latency format the
# processor has no brackets. `comm tid` or `comm pid/tid`, perhaps the processor: perf.
_FTRACE_TASK = re.compile(
    rb"\s{0,80}([^\n]{1,64})-(\d{1,10})(?:\s{1,20}\(\s{0,20}(\d{1,10}|-{1,10})\))?"
    rb"(?:\s{1,20}\[\d{1,5}\](?:\s{1,20}\S{1,16})?|\s{1,20}\d{1,5}[^\s\d/][^\s/]{0,16})?\s{0,80}"
)
_PERF_TASK = re.compile(
    rb"\s{0,80}([^\n]{1,64}?)\s{1,80}(?:(-?\d{1,10})/)?(-?\d{1,10})(?:\s{1,20}\[\d{1,5}\])?"
    rb"(?:\s{1,20}[^\s\d]\S{0,16})?\s{0,80}"
)
_LONGEST_HEAD = 256

_X = rb"(?:0x)?([0-9a-fA-F]{1,16})(?![0-9a-fA-F])"
_MAP = re.compile(
    rb"IOMMU: iova=" + _X + rb"(?: - " + _X + rb")? paddr=" + _X + rb" size=(\d{1,19})(?!\d)"
)
_UNMAP = re.compile(
    rb"IOMMU: iova=" + _X + rb"(?: - " + _X + rb")? size=(\d{1,19}) unmapped_size=(\d{1,19})(?!\d)"
)
_DEVICE = re.compile(rb"IOMMU: device=(\S{1,64})")
_FAULT = re.compile(
    rb"IOMMU:(?:\S{1,64} )?(\S{0,64})(?: driver=\S{0,64})? iova=" + _X + rb" flags=" + _X
)
_ATTRIBUTES = re.compile(_X + rb" -- " + _X + rb" \[" + _X + rb"\]")
_HYPERCALL = re.compile(rb"nr " + _X + rb" a0 " + _X + rb" a1 " + _X + rb" a2 " + _X)
_FIELD = re.compile(rb"(?<!\w)(\w{1,24})(?:=|: )(0x[0-9a-fA-F]{1,16}|-?\d{1,20})(?!\w)")

_NEEDS_PROCESS = (
    "iommu:map names no device, and this trace no process: everything is taken for one target"
    " (record-tgid for ftrace, -F +pid for perf: `ramblock check --how ftrace`)"
)
NEEDS_CLOCK = "the trace's clock counts ticks: its times are no nanoseconds (trace_clock)"


class Task(NamedTuple):
    """Who was running."""

    thread: str | None
    target: str
    """The target in whose name it maps."""
    source: Source
    has_process: bool


class KernelLine(NamedTuple):
    """One event's line, cut."""

    head: bytes
    """Task and processor."""
    time: int
    """Nanoseconds, or ticks."""
    name: bytes
    text: bytes
    is_fields: bool = False
    """The text is ``field: value, ...``, without those that are 0."""
    ticks: bool = False
    marker: bool = False
    """The text is a message of a program."""


def find_line(raw: bytes) -> KernelLine | None:
    """Cut a line; None: it is none of the kernel's."""
    # A quick look first: most lines of a QEMU log have no colon before a blank.
    for match in _LINE.finditer(raw) if b": " in raw else ():
        whole, fraction, micros, name = match.groups()
        if micros is not None:
            time = int(whole) * 1000
        elif fraction is None:
            time = int(whole)
        else:
            time = int(whole) * 10**9 + int(fraction) * (1000 if len(fraction) == 6 else 1)
        is_marker = name in _MARKERS
        if is_marker or name in _KNOWN:
            return KernelLine(
                raw[: match.start()],
                time,
                name,
                raw[match.end() :],
                ticks=fraction is None and micros is None,
                marker=is_marker,
            )
    call = _PERF_TRACE.match(raw)
    if call is None:
        return None
    time = int(call[1]) * 10**6 + int(call[2]) * 1000
    return KernelLine(call[3] + b" " + call[4], time, call[5], call[6], is_fields=True)


def find_task(head: bytes) -> tuple[str | None, str | None]:
    """Return thread and process of what stands before the time; the process may not be told."""
    head = head[-_LONGEST_HEAD:]
    match = _FTRACE_TASK.fullmatch(head)
    if match is not None:
        _, thread, process = match.groups()
        if process is not None and process.startswith(b"-"):
            process = None  # not recorded for this task
    else:
        match = _PERF_TASK.fullmatch(head)
        if match is None:
            return None, None
        _, process, thread = match.groups()
        if process is not None and int(process) < 0:
            process = None
    return thread.decode(), None if process is None else process.decode()


_F = TypeVar("_F", bound=Callable[..., Event | None])
_MAKERS: dict[bytes, Callable[..., Event | None]] = {}


def _means(name: bytes) -> Callable[[_F], _F]:
    """Say which event a method makes of a tracepoint's line."""

    def decorate(function: _F) -> _F:
        _MAKERS[name] = function
        return function

    return decorate


class KernelEvents:
    """
    The translation.

    :param needs: Gets what would tell more, by a word for it.
    :param source: Of events that belong to no process.
    """

    def __init__(self, source: Source, needs: dict[str, str]) -> None:
        self._source = source
        self._needs = needs

    def translate(self, line: KernelLine, number: int, task: Task) -> Event | None:
        """
        Say what one event means; None: nothing.

        :raises UnreadableError: Its text is not its own.
        """
        if line.ticks:
            self._needs["clock"] = NEEDS_CLOCK
        maker = _MAKERS.get(line.name)
        return None if maker is None else maker(self, line, number, task)

    @_means(b"map")
    def _map(self, line: KernelLine, number: int, task: Task) -> Event:
        match = _MAP.match(line.text)
        if match is not None:
            start, key, size = int(match[1], 16), int(match[3], 16), int(match[4])
            requested = match[2]
        else:
            fields = _fields(line, b"iova", b"paddr", b"size")
            start, key, size = fields
            requested = None
        if not task.has_process:
            self._needs["process"] = _NEEDS_PROCESS
        # The size is that of the mapping made; the range, in newer kernels, is the request's.
        end = end_of(start, size)
        if not size and requested is not None:
            end = int(requested, 16)
        return Map(line.time, task.source, number, task.target, start, end, done=size > 0, key=key)

    @_means(b"unmap")
    def _unmap(self, line: KernelLine, number: int, task: Task) -> Event:
        match = _UNMAP.match(line.text)
        if match is not None:
            start, size, unmapped = int(match[1], 16), int(match[3]), int(match[4])
            end = end_of(start, size) if match[2] is None else int(match[2], 16)
        else:
            start, size, unmapped = _fields(line, b"iova", b"size", b"unmapped_size")
            end = end_of(start, size)
        if end < start:
            raise UnreadableError
        return Unmap(line.time, task.source, number, task.target, start, end, unmapped)

    @_means(b"attach_device_to_domain")
    def _attach(self, line: KernelLine, number: int, task: Task) -> Event:
        match = _DEVICE.match(line.text)
        if match is None:
            raise UnreadableError
        device = match[1].decode(errors="replace")
        return Attach(line.time, task.source, number, task.target, device)

    @_means(b"io_page_fault")
    def _fault(self, line: KernelLine, number: int, task: Task) -> Event:
        match = _FAULT.match(line.text)
        if match is None:
            raise UnreadableError
        # It comes from an interrupt: the task that was running then has nothing to do with it.
        address = int(match[2], 16)
        device = match[1].decode(errors="replace") or None
        write = bool(int(match[3], 16) & _FAULT_WRITE)
        return Access(
            line.time, self._source, number, FAULTS, address, None, write, refused=True,
            device=device,
        )  # fmt: skip

    @_means(b"kvm_vm_set_mem_attributes")
    def _attributes(self, line: KernelLine, number: int, task: Task) -> Event:
        match = _ATTRIBUTES.match(line.text)
        if match is not None:
            start, end, attributes = (int(group, 16) for group in match.groups())
        else:
            start, end, attributes = _fields(line, b"start", b"end", b"attr")
        start, end = start << PAGE_SHIFT, end << PAGE_SHIFT
        if not start <= end <= 1 << 64:
            raise UnreadableError
        private = bool(attributes & _PRIVATE)
        return Attributes(line.time, task.source, number, start, end, private, task.thread)

    @_means(b"kvm_hypercall")
    def _hypercall(self, line: KernelLine, number: int, task: Task) -> Event | None:
        match = _HYPERCALL.match(line.text)
        if match is not None:
            call, gpa, pages, attributes = (int(group, 16) for group in match.groups())
        else:
            call, gpa, pages, attributes = _fields(line, b"nr", b"a0", b"a1", b"a2")
        if call != _MAP_GPA_RANGE or not 0 < pages <= 1 << 52 or gpa + (pages << 12) > 1 << 64:
            return None  # another call, or a request that cannot be meant
        end, private = gpa + (pages << PAGE_SHIFT), bool(attributes & _ENCRYPTED)
        return Conversion(line.time, task.source, number, gpa, end, private, task.thread)

    @_means(b"kvm_entry")
    def _entry(self, line: KernelLine, number: int, task: Task) -> Event | None:
        if task.thread is None:
            return None
        return VcpuEntry(line.time, task.source, number, task.thread)


_KNOWN = IGNORED | _MAKERS.keys()


def _fields(line: KernelLine, *names: bytes) -> tuple[int, ...]:
    """
    Read numbers by their fields' names, as trace-cmd and perf print them.

    :raises UnreadableError: One is missing, or is no number of 64 bits.
    """
    told = {}
    for name, digits in _FIELD.findall(line.text[:MAX_NAME]):
        told[name] = int(digits, 16) if digits.startswith(b"0x") else int(digits)
    # `perf trace` leaves out what is 0 (builtin-trace.c, trace__fprintf_tp_fields()).
    values = tuple(told.get(name, 0 if line.is_fields and told else -1) for name in names)
    if not all(0 <= value < 1 << 64 for value in values):
        raise UnreadableError
    return values
