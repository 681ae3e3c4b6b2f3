"""
Makes recordings that no program writes, field by field; and says what has to hold of any.

Lines are those of the formats with a field of each replaced: numbers of any length, words of any
bytes, separators repeated, times backwards, deep nesting. ``fuzz/readers.py`` plays it for as
long as it is asked to, the tests for a moment.
"""

import random
import re
import struct
from collections.abc import Callable
from itertools import pairwise

from ramblock.errors import TraceError
from ramblock.trace.events import Event, Source
from ramblock.trace.readers.base import MAX_NAME, TraceReader
from ramblock.trace.readers.registry import make_reader
from ramblock.trace.readers.text import TextReader
from simpletrace_writer import HEADER, event, mapping

__all__ = ["FORMATS", "make", "play"]

_MOST = 1 << 64

_HEADS = (
    "",
    "60@1795489710.193122:",
    "2026-11-24T03:08:30.193122Z ",
    "2026-11-24T03:08:30Z [td0] qemu-system-x86_64: (4711:CPU (1)/KVM: x): ",
    "4711@1795489710193122345 ",
    "Nov 24 03:08:30 node7 qemu-system-x86_64[4711]: ",
    "11月 24 03:08:30 node7 QEMU[4711]: ",
    "2026-11-24T03:08:30.193122345+01:00 stdout F \x1b[32m",
    'time="2026-11-24T03:08:30.193122Z" level=info msg="',
    '{"component": "virt-launcher", "timestamp": "2026-11-24T03:08:30.193222Z", "msg": "',
    '{"log":"time=\\"2026-11-24T03:08:30.1Z\\" level=info msg=\\"',
    "     CPU 0/KVM-82      (     60) [001] .....   12.000100: tracing_mark_write: ",
)
_TAILS = (
    "",
    '" name=containerd-shim-v2 pid=4700 qemuPid=4711',
    '"}',
    '\\"\\n"}',
    "\x1b[0m\r",
    "\r",
)
_QEMU = (
    "kvm_convert_memory start 0x100000 size 0x1000 private_to_shared",
    "kvm_convert_memory start 0x100000 size 0x1000 shared_to_private",
    (
        "kvm_set_user_memory AddrSpace#0 Slot#1 flags=0x4 gpa=0x0 size=0x80000000 ua=0x7f2000000000"
        " guest_memfd=14 guest_memfd_offset=0x0 ret=0"
    ),
    "kvm_set_user_memory Slot#1 flags=0x4 gpa=0x0 size=0x0 ua=0x7f2000000000 ret=0",
    "ram_block_attributes_state_change offset 0x1000 size 0x1000 from 'discarded' to 'populated'",
    "ram_block_discard_range pc.ram@0x7f2000100000 + 0x2000: madvise: 1 fallocate: 0 ret: 0",
    (
        "iommufd_backend_map_dma  iommufd=20 ioas=2 iova=0x100000 size=0x1000 addr=0x7f2000100000"
        " readonly=0 (0)"
    ),
    (
        "iommufd_backend_map_file_dma  iommufd=20 ioas=2 iova=0x0 size=0x1000 fd=1 start=0"
        " readonly=0 (-14)"
    ),
    "iommufd_backend_unmap_dma  iommufd=20 ioas=2 iova=0x100000 size=0x1000 (0)",
    "iommufd_backend_alloc_ioas  iommufd=20 ioas=2",
    "iommufd_backend_free_id  iommufd=20 id=2 (0)",
    'vfio_user_version  major 0 minor 0 caps: {"capabilities": {}}',
    "vfio_user_dma_map  iova 0x1000 size 0x1000 off 0x1000 flags 0x3 async_ops 1",
    "vfio_user_dma_unmap  iova 0x1000 size 0x1000 flags 0x0 async_ops 1",
    "vfio_user_send_write  id 0x4f wrote 0x30",
    "vfio_listener_region_add_ram region_add [ram] 0x0 - 0x3fffffff [0x7f2000000000]",
    "vfio_listener_region_del region_del 0x0 - 0x3fffffff",
    "vfio_iommu_map_notify iommu MAP @ 0xfffff000 - 0xffffffff",
    "virtio_mem_plug_request addr=0x100000000 nb_blocks=2",
    "virtio_mem_send_response type=0",
    "virtio_mem_unplugged_all ",
    "kvm_sev_init ",
    "qemu: vfio_container_dma_map(0x55d0, 0x1000, 0x2000, 0x7f00) = -22 (Invalid argument)",
    "qemu: vfio_ram_discard_notify_discard: vfio_container_dma_unmap() failed: No such file",
    "qemu: IOMMU_IOAS_MAP failed: Bad address, PCI BAR?",
    "qemu: Failed to notify the listener the state change of (0x1000 + 0x1000) to private",
    "qemu: ram_block_attributes_state_change, invalid range: offset 0xb8000, size 0x10000",
    "kvm_convert_memory 50.120 pid=4711 start=0x100000 size=0x1000 msg=private_to_shared",
)
_TASKS = (
    "     CPU 0/KVM-82      (     60) [001] .....   12.000100: ",
    "          <idle>-0     (-------) [001] d..1.   12.000100: ",
    "CPU 0/KVM    60/82    [001]     12.000100123: kvm:",
    "CPU 0/KVM    60/82     12.000100: iommu:",
    "  <idle>-0       0d.h4  306us!: ",
    "  qemu-82    [001]  123456789: ",
    "  qemu-82    [001]  12.000100: (+100) ",
)
_KERNEL = (
    "map: IOMMU: iova=0x0000000000100000 - 0x0000000000101000 paddr=0x0000000011110000 size=4096",
    "map: IOMMU: iova=0x0000000000100000 paddr=0x0000000011110000 size=4096",
    "unmap: IOMMU: iova=0x0000000000100000 - 0x0000000000101000 size=4096 unmapped_size=4096",
    "map: iova=1048576 paddr=286326784 size=4096",
    "kvm_vm_set_mem_attributes: 0x00000000000100 -- 0x00000000000101 [0x8]",
    "kvm_hypercall: nr 0xc a0 0x10000 a1 0x2 a2 0x10 a3 0x0",
    "kvm_entry: vcpu 0, rip 0xfff0",
    "io_page_fault: IOMMU:vfio 0000:c2:00.0 iova=0x00000000fe980000 flags=0x0001",
    "attach_device_to_domain: IOMMU: device=0000:00:09.0",
    "sched_switch: prev_comm=x",
)
_OTHERS = (
    "[   12.700010] DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x200000 [x",
    "vfio-pci 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x12 address=0x2 flags=0x0]",
    "0.100 CPU 0/KVM/82 iommu:map(iova: 1048576, paddr: 286326784, size: 4096)",
    "ramblock-vfio map 1000 77 78 0x100000 0x1000 0x1000 0 qemu",
    "ramblock-vfio unmap 3000 77 78 0x100000 0x3000 0x2000 -22 qemu kvm",
    "CPU:0 [LOST 62 EVENTS]",
    "\tffffffff8112 iommu_map+0x10 ([kernel.kallsyms])",
)
_OWN = (
    '{"t":1,"event":"start","version":1,"blocks":[{"name":"low","gpa":0,"size":4096}]}',
    '{"t":5,"event":"attributes","gpa":0,"size":8192,"private":true}',
    '{"t":5,"event":"map","target":"a","iova":4096,"size":4096,"writable":false}',
    '{"t":5,"event":"unmap","target":"a","iova":0,"size":4096,"unmapped":0}',
    '{"t":5,"event":"free","side":"private","gpa":0,"size":4096}',
    (
        '{"t":5,"event":"state_change","block":"low","offset":0,"size":4096,"before":"shared",'
        '"after":"private"}'
    ),
    '{"t":5,"event":"conversion","gpa":0,"size":4096,"to":"shared","result":"done","took":2}',
    '{"t":5,"event":"violation","target":"a","rule":"overlap","iova":0,"size":16,"reason":"r"}',
    '{"t":5,"event":"stale","target":"a","iova":0,"size":16}',
    '{"t":5,"event":"summary","whatever":[1]}',
)
_NUMBER = re.compile(rb"0x[0-9a-f]+|\d+")
_SEPARATOR = re.compile(rb"[ :=,\-\[\](){}\"'\\@.\t]")
_WORD = re.compile(rb"[A-Za-z_]{3,}")


def _text(parts: tuple[str, ...], heads: tuple[str, ...] = ("",)) -> Callable[..., bytes]:
    def line(chance: random.Random) -> bytes:
        head = chance.choice(heads)
        tail = chance.choice(_TAILS) if heads is _HEADS else ""
        return (head + chance.choice(parts) + tail).encode()

    return line


_LINES: dict[str, tuple[Callable[[random.Random], bytes], ...]] = {
    "qemu": (_text(_QEMU, _HEADS), _text(_QEMU, _HEADS[:3])),
    "ftrace": (_text(_KERNEL, _TASKS), _text(_KERNEL, _TASKS[:1]), _text(_OTHERS)),
    "bpftrace": (_text(_OTHERS), _text(_QEMU, _HEADS)),
    "ramblock": (_text(_OWN),),
}
#: Formats that are fuzzed.
FORMATS = (*_LINES, "simpletrace")


def make(name: str, seed: int, lines: int = 400) -> bytes:
    """Make a recording of a format."""
    chance = random.Random(f"{name}{seed}")
    if name == "simpletrace":
        return _binary(chance, lines)
    kinds = _LINES[name]
    rate = chance.choice((0.0, 0.1, 0.5))
    made: list[bytes] = []
    while len(made) < lines:
        line = chance.choice(kinds)(chance)
        if chance.random() < rate:
            line = _damage(line, chance)
        # Runs as real programs write them.
        made += [line] * chance.choice((1, 1, 1, 7))
    return b"\n".join(made) + chance.choice((b"\n", b""))


def _damage(line: bytes, chance: random.Random) -> bytes:
    way = chance.randrange(6)
    if way == 0:
        return _replace(line, _NUMBER, _number(chance), chance)
    if way == 1:
        return _replace(line, _WORD, chance.randbytes(chance.choice((0, 3, 400))), chance)
    if way == 2:
        found = _SEPARATOR.search(line, chance.randrange(len(line)))
        if found is not None:
            times = chance.choice((2, 40, 5000))
            return line[: found.start()] + found[0] * times + line[found.end() :]
    if way == 3:
        return line[: chance.randrange(len(line))]
    if way == 4:
        where = chance.randrange(len(line) + 1)
        return line[:where] + chance.choice((b"[", b'{"a":', b"(", b"\\")) * 3000 + line[where:]
    where = chance.randrange(len(line))
    return line[:where] + bytes([chance.randrange(256)]) + line[where + 1 :]


def _number(chance: random.Random) -> bytes:
    digits = chance.choice((1, 16, 17, 20, 300, 5000))
    form = chance.choice(("{}", "-{}", "0x{:x}", "{}e9", "0{}", "0x{:X}"))
    return form.format(chance.randrange(10 ** min(digits, 300))).encode() * max(1, digits // 300)


def _replace(line: bytes, what: re.Pattern[bytes], by: bytes, chance: random.Random) -> bytes:
    found = list(what.finditer(line))
    if not found:
        return line
    match = chance.choice(found)
    return line[: match.start()] + by + line[match.end() :]


def _binary(chance: random.Random, records: int) -> bytes:
    names = ("kvm_convert_memory", "iommufd_backend_map_dma", "vfio_user_dma_unmap", "other")
    data = [HEADER, *(mapping(number, name) for number, name in enumerate(names))]
    for _ in range(records):
        word = chance.choice((0, 1, 0x1000, _MOST - 1, _MOST // 2))
        data.append(
            chance.choice(
                (
                    event(0, word, 0x1000, word, b"shared_to_private"),
                    event(0, 5, word, 0x1000, chance.randbytes(chance.choice((0, 17, 900)))),
                    event(1, 5, 20, 2, word, 0x1000, word, 0, chance.choice((0, -14))),
                    event(2, 7, word, 0x1000, 0, 1),
                    event(3, 7),
                    struct.pack("<QQI", 0, chance.randrange(6), 3) + b"abc",
                )
            )
        )
    whole = bytearray(b"".join(data))
    for _ in range(chance.choice((0, 0, 1, 5))):
        whole[chance.randrange(len(whole))] = chance.randrange(256)
    return bytes(whole)


def play(name: str, data: bytes) -> list[Event]:
    """
    Read a recording in two chunkings, and a text with care as well; return its events.

    :raises AssertionError: Something that has to hold does not.
    """
    whole = _read(make_reader(name, Source("f", name)), data, len(data) + 1)
    pieces = _read(make_reader(name, Source("f", name)), data, 1000)
    assert whole == pieces
    if name in ("qemu", "ftrace", "bpftrace"):
        assert whole == _read(TextReader(Source("f", name)), data, len(data) + 1)
    _, found = whole[0], whole[-1]
    _check(found)
    return found


def _read(
    reader: TraceReader, data: bytes, step: int
) -> tuple[str, object, dict[str, str], list[str | None], list[Event]]:
    found: list[Event] = []
    ended = ""
    try:
        for position in range(0, len(data), step):
            found += reader.feed(data[position : position + step])
        found += reader.finish()
    except TraceError as error:
        ended = f"{error.path}:{error.line}: {error}"
    if ended:
        assert re.match(r"f:\d+: f:\d+: ", ended), ended
        assert "the reader failed" not in ended, ended
    guests = [each.source.guest for each in found]
    for each in found:
        each.source = _ANY  # sources are compared by their guests
    return ended, reader.counts, reader.needs, guests, found


_ANY = Source("", "")


def _check(found: list[Event]) -> None:
    for each in found:
        start, end = getattr(each, "start", None), getattr(each, "end", None)
        if start is not None and end is not None:
            assert 0 <= start <= end <= _MOST, each
        for field in each.__struct_fields__:
            value = getattr(each, field)
            if isinstance(value, str):
                assert len(value) <= MAX_NAME + 20, each
    lines = [each.line for each in found]
    assert all(before <= behind + 1_000_000 for before, behind in pairwise(lines))
