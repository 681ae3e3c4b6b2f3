"""Readers of each format, samples for them, and what there is to say of any of them."""

import gzip
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from ramblock.trace.events import Event, Source
from ramblock.trace.readers.base import TraceReader
from ramblock.trace.readers.registry import make_reader
from simpletrace_writer import simpletrace_of

__all__ = [
    "DATA",
    "READERS",
    "Shown",
    "qemu_lines",
    "read",
    "read_in_pieces",
    "reader_of",
    "recording",
    "sample",
    "show",
]

DATA = Path(__file__).parent / "data"
BLOCK = 2 << 20


def reader_of(name: str, **options: int) -> TraceReader:
    """Make a format's reader."""
    return make_reader(name, Source("f", name), **options)


READERS: dict[str, Callable[[], TraceReader]] = {
    name: partial(reader_of, name, virtio_mem_block_size=BLOCK)
    for name in ("ramblock", "qemu", "simpletrace", "ftrace", "bpftrace")
}

Shown = tuple[object, ...]


def show(event: Event) -> Shown:
    """Return an event without its source, in a form that can be compared."""
    fields = msgspec.structs.asdict(event)
    del fields["source"]
    return (type(event).__name__, *fields.values())


def read(reader: TraceReader, data: bytes) -> list[Event]:
    """Read all at once."""
    return reader.feed(data) + reader.finish()


def read_in_pieces(reader: TraceReader, data: bytes, seed: int, longest: int) -> list[Event]:
    """Read in pieces of random length."""
    chance = random.Random(seed)
    found = []
    position = 0
    while position < len(data):
        size = chance.randint(1, longest)
        found += reader.feed(data[position : position + size])
        position += size
    return found + reader.finish()


def recording(name: str) -> bytes:
    """Return what a compressed recording of tests/data holds."""
    return gzip.decompress((DATA / name).read_bytes())


def qemu_lines(name: str) -> list[str]:
    """Return the lines of a recording of QEMU."""
    return recording(name).decode().splitlines()


_BPFTRACE = b"""\
Attaching 5 probes...
ramblock-vfio map 1000 77 78 0x0 0x200000 0x200000 0 qemu
ramblock-vfio map 2000 77 78 0x200000 0x200000 0x0 -17 qemu
ramblock-vfio unmap 3000 77 78 0x0 0x200000 0x200000 0 qemu
Lost 5 events
ramblock-vfio unmap 4000 77 78 0x0 0x0 0x400000 0 qemu kvm
"""


def sample(name: str, lines: int | None = None) -> bytes:
    """
    Return a trace of each format: real ones, but for bpftrace's, and the binary one, which is made
    from QEMU's text.
    """
    if name == "bpftrace":
        return _BPFTRACE
    if name == "simpletrace":
        return simpletrace_of(qemu_lines("qemu-lenient.trace.gz")[:lines])
    file = {
        "ramblock": "probe-qemu-exact.jsonl.gz",
        "qemu": "qemu-lenient.trace.gz",
        "ftrace": "ftrace-uncoordinated.txt.gz",
    }[name]
    return b"".join(recording(file).splitlines(keepends=True)[:lines])


def as_shown(events: Sequence[Event]) -> list[Shown]:
    """Show all."""
    return [show(event) for event in events]
