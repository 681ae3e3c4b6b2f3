# SPDX-License-Identifier: Apache-2.0
"""
The kernel's tracepoints as events (trace/events/iommu.h and kvm.h, arch/x86/kvm/trace.h).

``iommu:map`` names neither domain nor device, so one process is taken for one target; type1 maps
everything once for each domain of its container, which shows as the same event again.
``kvm_vm_set_mem_attributes`` is written at entry, so for calls that fail too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

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

__all__ = ["IGNORED", "KernelEvents", "NotUnderstoodError", "Task"]

#: Known, and of no meaning here.
IGNORED = frozenset(
    {
        "add_device_to_group",
        "remove_device_from_group",
        "detach_device_from_domain",
        "kvm_exit",
        "kvm_userspace_exit",
        "kvm_page_fault",
        "kvm_unmap_hva_range",
        "kvm_vmgexit_enter",
        "kvm_vmgexit_exit",
        "kvm_vmgexit_msr_protocol_enter",
        "kvm_vmgexit_msr_protocol_exit",
        "kvm_rmp_fault",
        "swiotlb_bounced",
    }
)

_PRIVATE = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE
_MAP_GPA_RANGE = 12  # KVM_HC_MAP_GPA_RANGE
_ENCRYPTED = 1 << 4  # KVM_MAP_GPA_RANGE_ENCRYPTED
_FAULT_WRITE = 1  # IOMMU_FAULT_WRITE
_PAGE = 4096

_X = rb"(?:0x)?([0-9a-fA-F]+)"
_MAP = re.compile(rb"IOMMU: iova=" + _X + rb" - " + _X + rb" paddr=" + _X + rb" size=(\d+)")
_UNMAP = re.compile(rb"IOMMU: iova=" + _X + rb" - " + _X + rb" size=\d+ unmapped_size=(\d+)")
_DEVICE = re.compile(rb"IOMMU: device=(\S+)")
_FAULT = re.compile(rb"IOMMU:.* iova=" + _X + rb" flags=" + _X)
_ATTRIBUTES = re.compile(_X + rb" -- " + _X + rb" \[" + _X + rb"\]")
_HYPERCALL = re.compile(rb"nr " + _X + rb" a0 " + _X + rb" a1 " + _X + rb" a2 " + _X)

_NEEDS_PROCESS = (
    "iommu:map names no device, and this trace no process: everything is taken for one target"
    " (record-tgid for ftrace, -F +pid for perf: `ramblock check --how ftrace`)"
)


class NotUnderstoodError(Exception):
    """An event of this name, with a text that is not its own."""


class Task(NamedTuple):
    """Who was running."""

    thread: str
    target: str
    """The target in whose name it maps."""
    has_process: bool


class KernelEvents:
    """The translation."""

    def __init__(self, source: Source) -> None:
        self._source = source
        #: Further sources that would tell more, by a keyword.
        self.needs: dict[str, str] = {}
        self.makers: dict[bytes, Callable[[int, int, Task, bytes], Event | None]] = {
            b"map": self._map,
            b"unmap": self._unmap,
            b"attach_device_to_domain": self._attach,
            b"io_page_fault": self._fault,
            b"kvm_vm_set_mem_attributes": self._attributes,
            b"kvm_hypercall": self._hypercall,
            b"kvm_entry": self._entry,
        }

    def _map(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _MAP.match(text)
        if match is None:
            raise NotUnderstoodError
        if not task.has_process:
            self.needs["process"] = _NEEDS_PROCESS
        start, size = int(match[1], 16), int(match[4])
        # The size is that of the mapping made; the range is the request's.
        end = start + size if size else int(match[2], 16)
        return Map(
            time,
            self._source,
            line,
            task.target,
            start,
            end,
            done=size > 0,
            key=int(match[3], 16),
        )

    def _unmap(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _UNMAP.match(text)
        if match is None:
            raise NotUnderstoodError
        start, end, unmapped = int(match[1], 16), int(match[2], 16), int(match[3])
        return Unmap(time, self._source, line, task.target, start, end, unmapped)

    def _attach(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _DEVICE.match(text)
        if match is None:
            raise NotUnderstoodError
        return Attach(time, self._source, line, task.target, match[1].decode(errors="replace"))

    def _fault(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _FAULT.match(text)
        if match is None:
            raise NotUnderstoodError
        # It comes from an interrupt: the task that was running then has nothing to do with it.
        write = bool(int(match[2], 16) & _FAULT_WRITE)
        return Access(
            time, self._source, line, "faults", int(match[1], 16), None, write, refused=True
        )

    def _attributes(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _ATTRIBUTES.match(text)
        if match is None:
            raise NotUnderstoodError
        start, end, attributes = (int(group, 16) for group in match.groups())
        private = bool(attributes & _PRIVATE)
        return Attributes(
            time, self._source, line, start * _PAGE, end * _PAGE, private, task.thread
        )

    def _hypercall(self, time: int, line: int, task: Task, text: bytes) -> Event | None:
        match = _HYPERCALL.match(text)
        if match is None:
            raise NotUnderstoodError
        number, gpa, pages, attributes = (int(group, 16) for group in match.groups())
        if number != _MAP_GPA_RANGE or not 0 < pages <= (1 << 52) or gpa + pages * _PAGE > 1 << 64:
            return None  # another call, or a request that cannot be meant
        private = bool(attributes & _ENCRYPTED)
        return Conversion(time, self._source, line, gpa, gpa + pages * _PAGE, private, task.thread)

    def _entry(self, time: int, line: int, task: Task, _text: bytes) -> Event | None:
        return VcpuEntry(time, self._source, line, task.thread)
