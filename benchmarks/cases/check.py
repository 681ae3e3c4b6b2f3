# SPDX-License-Identifier: Apache-2.0
"""
``ramblock check``: parse and audit, events per second for each format, and what memory it takes.

The trace is made while it is read, a block at a time, and only reading and auditing are timed. A
guest converts its pages to and fro; two devices follow, or one where the format knows no more.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from time import thread_time_ns

from harness.context import Context
from harness.measure import resident_bytes
from harness.rows import Row, Samples
from ramblock.trace.audit import Audit
from ramblock.trace.events import Source
from ramblock.trace.readers.base import TraceReader
from ramblock.trace.readers.registry import make_reader

__all__ = ["CASE", "qemu_text", "run", "small_conversions"]

CASE = "check: read and audit a trace"

_CHECK = "ramblock check"
_SECOND = 10**9
#: Pages that are converted, one after the other, 64 KiB apart: the map of the guest has as many
#: runs.
_PLACES = 4096
_STEP = 1 << 16
_SIZE = 1 << 14
_CONVERSIONS_A_BLOCK = 4096


def run(context: Context) -> Iterator[Row]:
    """Yield a row for each format."""
    context.say(CASE)
    wanted = context.choose(100_000, 20_000_000)
    for name, (format_name, block) in _FORMATS.items():
        reader = make_reader(format_name, Source("made", format_name))
        yield _measure(context, name, reader, block, wanted)


def small_conversions(blocks: int) -> Iterator[tuple[str, bytes]]:
    """Yield each format's name, and a trace of so many blocks."""
    for name, (_, block) in _FORMATS.items():
        yield name, _HEADS.get(name, b"") + b"".join(map(block, range(blocks)))


def _measure(
    context: Context, name: str, reader: TraceReader, block: Callable[[int], bytes], wanted: int
) -> Row:
    audit = Audit()
    events = number = 0
    rates: list[float] = []
    early = 0
    audit.feed(reader.feed(_HEADS.get(name, b"")))
    while events < wanted:
        data = block(number)
        number += 1
        before = thread_time_ns()
        found = reader.feed(data)
        audit.feed(found)
        elapsed = thread_time_ns() - before
        events += len(found)
        rates.append(len(found) * _SECOND / elapsed)
        if not early and events > wanted // 4:
            early = resident_bytes()
    late = resident_bytes()
    result = audit.finish()
    if result.failures() or reader.counts.unknown:
        raise RuntimeError(f"{name}: the made trace is not clean: {result.findings[:3]}")
    samples = Samples()
    samples.add(_CHECK, rates)
    return samples.row(
        CASE,
        {"format": name, "events": f"{events:,}"},
        facts={
            "resident, bytes": late,
            "more than after a quarter": max(late - early, 0),
        },
        unit="/s",
    )


def _conversions(block: int) -> Iterator[tuple[int, int, bool]]:
    """Yield time in ns, address, and whether to private."""
    for index in range(block * _CONVERSIONS_A_BLOCK, (block + 1) * _CONVERSIONS_A_BLOCK):
        turn, place = divmod(index, _PLACES)
        yield index * 40_000, place * _STEP, bool(turn % 2)


def _own(block: int) -> bytes:
    lines = []
    for time, gpa, private in _conversions(block):
        place = f'"size":{_SIZE}'
        attributes = (
            f'{{"t":{time},"event":"attributes","gpa":{gpa},{place}'
            f',"private":{"true" if private else "false"}}}\n'
        )
        if private:
            lines += [
                f'{{"t":{time},"event":"unmap","target":"iommu{n}","iova":{gpa},{place}'
                f',"unmapped":{_SIZE}}}\n'
                for n in (0, 1)
            ]
            lines.append(attributes)
            lines.append(f'{{"t":{time},"event":"free","side":"shared","gpa":{gpa},{place}}}\n')
        else:
            lines.append(attributes)
            lines += [
                f'{{"t":{time},"event":"map","target":"iommu{n}","iova":{gpa},{place}'
                ',"writable":true}\n'
                for n in (0, 1)
            ]
        to = "private" if private else "shared"
        lines.append(
            f'{{"t":{time + 9000},"event":"conversion","gpa":{gpa},{place},"to":"{to}"'
            ',"result":"done","took":9000}\n'
        )
    return "".join(lines).encode()


def qemu_text(block: int) -> bytes:
    """Make a block of QEMU's text, some 8,000 lines."""
    lines = []
    for time, gpa, private in _conversions(block):
        stamp = f"1@{time // _SECOND}.{time % _SECOND // 1000:06}:"
        change = "shared_to_private" if private else "private_to_shared"
        lines.append(f"{stamp}kvm_convert_memory start {gpa:#x} size {_SIZE:#x} {change}\n")
        what = (
            f"unmap_dma  iommufd=9 ioas=2 iova={gpa:#x} size={_SIZE:#x} (0)"
            if private
            else f"map_dma  iommufd=9 ioas=2 iova={gpa:#x} size={_SIZE:#x}"
            f" addr={gpa + (1 << 46):#x} readonly=0 (0)"
        )
        lines.append(f"{stamp}iommufd_backend_{what}\n")
    return "".join(lines).encode()


_EVENT = struct.Struct("<QQQII")


def _record(number: int, time: int, *words: int | bytes) -> bytes:
    body = b"".join(
        struct.pack("<I", len(word)) + word if isinstance(word, bytes) else struct.pack("<Q", word)
        for word in words
    )
    return _EVENT.pack(1, number, time, _EVENT.size - 8 + len(body), 1) + body


def _simpletrace(block: int) -> bytes:
    records = []
    for time, gpa, private in _conversions(block):
        change = b"shared_to_private" if private else b"private_to_shared"
        records.append(_record(0, time, gpa, _SIZE, change))
        if private:
            records.append(_record(2, time, 9, 2, gpa, _SIZE, 0))
        else:
            records.append(_record(1, time, 9, 2, gpa, _SIZE, gpa + (1 << 46), 0, 0))
    return b"".join(records)


def _name(number: int, name: bytes) -> bytes:
    return struct.pack("<QQI", 0, number, len(name)) + name


def _ftrace(block: int) -> bytes:
    lines = []
    for time, gpa, private in _conversions(block):
        stamp = f"{time // _SECOND}.{time % _SECOND // 1000:06}"
        head = f"     CPU 0/KVM-62      (     60) [001] ..... {stamp}: "
        end = gpa + _SIZE
        bits = 8 if private else 0
        lines.append(
            f"{head}kvm_hypercall: nr 0xc a0 {gpa:#x} a1 {_SIZE >> 12:#x} a2 {bits * 2:#x} a3 0x0\n"
        )
        attributes = (
            f"{head}kvm_vm_set_mem_attributes: {gpa >> 12:#016x} -- {end >> 12:#016x} [{bits:#x}]\n"
        )
        span = f"iova={gpa:#018x} - {end:#018x}"
        if private:
            lines.append(f"{head}unmap: IOMMU: {span} size={_SIZE} unmapped_size={_SIZE}\n")
            lines.append(attributes)
        else:
            lines.append(attributes)
            lines.append(f"{head}map: IOMMU: {span} paddr={gpa:#018x} size={_SIZE}\n")
        lines.append(f"{head}kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x00000000\n")
    return "".join(lines).encode()


def _bpftrace(block: int) -> bytes:
    lines = [
        f"ramblock-vfio {'unmap' if private else 'map'} {time} 60 62"
        f" {gpa:#x} {_SIZE:#x} {_SIZE:#x} 0 qemu\n"
        for time, gpa, private in _conversions(block)
    ]
    return "".join(lines).encode()


_HEADS = {
    "ramblock": b'{"t":0,"event":"start","version":1,'
    b'"blocks":[{"name":"ram","gpa":0,"size":1073741824,"confidential":true}],'
    b'"targets":{"iommu0":"","iommu1":""}}\n',
    "QEMU, binary": struct.pack("<QQQ", (1 << 64) - 1, 0xF2B177CB0AA429B4, 4)
    + _name(0, b"kvm_convert_memory")
    + _name(1, b"iommufd_backend_map_dma")
    + _name(2, b"iommufd_backend_unmap_dma"),
}
_FORMATS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "ramblock": ("ramblock", _own),
    "QEMU, text": ("qemu", qemu_text),
    "QEMU, binary": ("simpletrace", _simpletrace),
    "ftrace": ("ftrace", _ftrace),
    "bpftrace": ("bpftrace", _bpftrace),
}
