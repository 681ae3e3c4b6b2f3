# SPDX-License-Identifier: Apache-2.0
"""
Traces in which events come in runs, as real VMMs write them: 2 MiB conversions, mapped by page.

To shared, QEMU maps 512 pages, each with a call of its own (hw/vfio/listener.c, by the granularity
of the discard manager). To private it unmaps the range with one call; the kernel's tracepoints show
that page by page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

__all__ = ["TRACES", "live_runs"]

_PAGE, _SIZE = 1 << 12, 1 << 21
_PAGES = range(0, _SIZE, _PAGE)
_PLACES = 512
_HOST = 1 << 46
_SECOND = 10**9
_CPU = "     CPU 0/KVM-62      (     60) [001] ..... "


def _conversions(number: int) -> Iterator[tuple[int, int, bool]]:
    """Yield time in ns, address, and whether to private."""
    for index in range(number):
        turn, place = divmod(index, _PLACES)
        yield index * 40_000_000, place * _SIZE, bool(turn % 2)


def _stamp(time: int) -> str:
    return f"{time // _SECOND}.{time % _SECOND // 1000:06}"


def _qemu(number: int) -> bytes:
    lines = []
    for time, gpa, private in _conversions(number):
        word = "shared_to_private" if private else "private_to_shared"
        lines.append(f"1@{_stamp(time)}:kvm_convert_memory start {gpa:#x} size {_SIZE:#x} {word}\n")
        if private:
            lines.append(
                f"1@{_stamp(time + 9000)}:iommufd_backend_unmap_dma  iommufd=9 ioas=2 iova={gpa:#x}"
                f" size={_SIZE:#x} (0)\n"
            )
            continue
        lines += [
            f"1@{_stamp(time + 9000 + page)}:iommufd_backend_map_dma  iommufd=9 ioas=2"
            f" iova={gpa + page:#x} size={_PAGE:#x} addr={gpa + page + _HOST:#x} readonly=0 (0)\n"
            for page in _PAGES
        ]
    return "".join(lines).encode()


_EVENT = struct.Struct("<QQQII")


def _record(number: int, time: int, *words: int | bytes) -> bytes:
    body = b"".join(
        struct.pack("<I", len(word)) + word if isinstance(word, bytes) else struct.pack("<Q", word)
        for word in words
    )
    return _EVENT.pack(1, number, time, _EVENT.size - 8 + len(body), 1) + body


def _simpletrace(number: int) -> bytes:
    names = (b"kvm_convert_memory", b"iommufd_backend_map_dma", b"iommufd_backend_unmap_dma")
    records = [struct.pack("<QQQ", (1 << 64) - 1, 0xF2B177CB0AA429B4, 4)]
    records += [struct.pack("<QQI", 0, each, len(name)) + name for each, name in enumerate(names)]
    for time, gpa, private in _conversions(number):
        word = b"shared_to_private" if private else b"private_to_shared"
        records.append(_record(0, time, gpa, _SIZE, word))
        if private:
            records.append(_record(2, time + 9000, 9, 2, gpa, _SIZE, 0))
            continue
        records += [
            _record(1, time + 9000 + page, 9, 2, gpa + page, _PAGE, gpa + page + _HOST, 0, 0)
            for page in _PAGES
        ]
    return b"".join(records)


def _ftrace(number: int) -> bytes:
    lines = []
    for time, gpa, private in _conversions(number):
        head = f"{_CPU}{_stamp(time)}: "
        end, bits = gpa + _SIZE, 8 if private else 0
        lines.append(
            f"{head}kvm_hypercall: nr 0xc a0 {gpa:#x} a1 {_SIZE >> 12:#x} a2 {bits * 2:#x} a3 0x0\n"
        )
        attributes = (
            f"{head}kvm_vm_set_mem_attributes: {gpa >> 12:#016x} -- {end >> 12:#016x} [{bits:#x}]\n"
        )
        if not private:
            lines.append(attributes)
        for page in _PAGES:
            span = f"iova={gpa + page:#018x} - {gpa + page + _PAGE:#018x}"
            text = (
                f"unmap: IOMMU: {span} size={_PAGE} unmapped_size={_PAGE}"
                if private
                else f"map: IOMMU: {span} paddr={gpa + page + _HOST:#018x} size={_PAGE}"
            )
            lines.append(f"{_CPU}{_stamp(time + 9000 + page)}: {text}\n")
        if private:
            lines.append(attributes.replace(_stamp(time), _stamp(time + 3_000_000)))
        lines.append(f"{_CPU}{_stamp(time + 3_000_000)}: kvm_entry: vcpu 0, rip 0xfff0\n")
    return "".join(lines).encode()


def _bpftrace(number: int) -> bytes:
    lines = []
    for time, gpa, private in _conversions(number):
        if private:
            lines.append(
                f"ramblock-vfio unmap {time} 60 62 {gpa:#x} {_SIZE:#x} {_SIZE:#x} 0 qemu\n"
            )
            continue
        lines += [
            f"ramblock-vfio map {time + page} 60 62 {gpa + page:#x} {_PAGE:#x} {_PAGE:#x} 0 qemu\n"
            for page in _PAGES
        ]
    return "".join(lines).encode()


def _own(number: int) -> bytes:
    start = (
        '{"t":0,"event":"start","version":1,"blocks":[{"name":"ram","gpa":0,"size":1073741824,'
        '"confidential":true}],"targets":{"iommu0":""}}\n'
    )
    lines = [start]
    for time, gpa, private in _conversions(number):
        attributes = (
            f'{{"t":{time},"event":"attributes","gpa":{gpa},"size":{_SIZE}'
            f',"private":{"true" if private else "false"}}}\n'
        )
        if private:
            lines.append(
                f'{{"t":{time},"event":"unmap","target":"iommu0","iova":{gpa},"size":{_SIZE}'
                f',"unmapped":{_SIZE}}}\n'
            )
        lines.append(attributes)
        if not private:
            lines += [
                f'{{"t":{time + page},"event":"map","target":"iommu0","iova":{gpa + page}'
                f',"size":{_PAGE},"writable":true}}\n'
                for page in _PAGES
            ]
        lines.append(
            f'{{"t":{time + 3_000_000},"event":"conversion","gpa":{gpa},"size":{_SIZE}'
            f',"to":"{"private" if private else "shared"}","result":"done","took":3000000}}\n'
        )
    return "".join(lines).encode()


#: By format: the function that makes a trace of so many conversions. Not each line is an event in
#: every version, so versions are compared by the time that the same bytes take.
TRACES: dict[str, Callable[[int], bytes]] = {
    "ramblock": _own,
    "QEMU, text": _qemu,
    "QEMU, binary": _simpletrace,
    "ftrace": _ftrace,
    "bpftrace": _bpftrace,
}


def live_runs(number: int) -> bytes:
    """Make a trace in QEMU's text that ends with so many mappings, none beside another."""
    lines = []
    for index in range(number):
        stamp, gpa = _stamp(index * 40_000), index << 16
        lines.append(f"1@{stamp}:kvm_convert_memory start {gpa:#x} size 0x1000 private_to_shared\n")
        lines.append(
            f"1@{stamp}:iommufd_backend_map_dma  iommufd=9 ioas=2 iova={gpa:#x} size=0x1000"
            f" addr={gpa + _HOST:#x} readonly=0 (0)\n"
        )
    return "".join(lines).encode()
