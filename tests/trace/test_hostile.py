"""
What a recording may hold that somebody made to hurt.

Work is counted in Python's calls, never in seconds. A pattern that walks back over its line takes
no calls; but on a line of a megabyte it would need
hours, and the limit of a test ends it.
"""

import gzip
import sys
import tracemalloc
from collections.abc import Callable

import pytest

from ramblock.errors import TraceError
from ramblock.trace.readers.base import MAX_LINE
from ramblock.trace.readers.qemu_meaning import _MEANINGS
from ramblock.trace.readers.qemu_table import EVENTS, IGNORED, forms_of
from trace_fuzz import _KERNEL, _OTHERS, _OWN, _QEMU, _TASKS
from trace_samples import reader_of


def _play(name: str, data: bytes) -> None:
    reader = reader_of(name)
    ended = ""
    try:
        reader.feed(data)
        reader.finish()
    except TraceError as error:
        ended = str(error)
    assert "the reader failed" not in ended


def _long_lines() -> list[bytes]:
    """Lines of the formats, each separator of them repeated until the line has a megabyte."""
    made = set()
    lines = [*_QEMU, *(task + event for task in _TASKS[:2] for event in _KERNEL[:5]), *_OTHERS]
    for number, line in enumerate(lines):
        places = [place for place, letter in enumerate(line) if not letter.isalnum()]
        place = places[number * 7 % len(places)]
        separator = line[place].encode()
        made.add(line[:place].encode() + separator * MAX_LINE + line[place:].encode())
    # Every separator, before and behind an event that can be read.
    for code in b" :=,-[](){}\"'\\@.\t\r\x1b/<>+#%&;|~0aZ":
        run = bytes([code]) * (MAX_LINE // 2 - 100)
        made.add(run + b" kvm_sev_init " + run)
    made |= {
        piece * (MAX_LINE // len(piece))
        for piece in (
            b"kvm_convert_memory ",
            b"ram_block_discard_range ",
            b"kvm_convert_memory start 0x1",
            b"vfio_dma_map(",
            b"AMD-Vi: DMAR: ",
            b"12.000001: map: ",
            b" [1] 1.000000:",
            b"2026-11-24T03:08:30",
            b"1@1.000000:",
            b"(1:",
            b"\x1b[",
            b'\\"',
            b"ramblock-vfio map ",
            b"9",
            b"a-1 ",
        )
    }
    return sorted(made)


@pytest.mark.parametrize("line", _long_lines(), ids=lambda line: line[:24].decode(errors="replace"))
def test_a_line_of_a_megabyte(line: bytes) -> None:
    _play("qemu", line + b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b'{"t":5,"event":"map","target":"a","iova":' + b"9" * 500_000 + b',"size":1}',
        b'{"t":5,"event":"x","y":' + b"[" * 500_000,
        b'{"t":5,"event":"map","target":"' + b"a" * 500_000 + b'","iova":0,"size":1}',
        b'{"t":5,"event":"violation","target":"a","rule":"' + b"r" * 9000 + b'","reason":"x"}',
    ],
)
def test_an_own_line_that_cannot_be_meant(line: bytes) -> None:
    _play("ramblock", line + b"\n")


def _steps(name: str, data: bytes) -> int:
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1

    reader = reader_of(name)
    sys.setprofile(step)
    try:
        reader.feed(data)
        reader.finish()
    except TraceError:
        pass
    finally:
        sys.setprofile(None)
    return count


_WIDE: dict[str, tuple[str, Callable[[int], str]]] = {
    "maps of one target": ("qemu", lambda n: f"1@1.{n:06}:{_QEMU[6]}"),
    "as many targets": ("qemu", lambda n: _QEMU[6].replace("ioas=2", f"ioas={n}")),
    "as many slots": ("qemu", lambda n: _QEMU[2].replace("Slot#1", f"Slot#{n}")),
    "as many guests": ("qemu", lambda n: f"Nov 24 03:08:30 n qemu[{n}]: {_QEMU[0]}"),
    "failures of as many guests": (
        "qemu",
        lambda n: f"Nov 24 03:08:30 n qemu[{n}]: qemu: IOMMU_IOAS_MAP failed: x",
    ),
    "copies": (
        "qemu",
        lambda n: f'time="2026-02-19T13:46:44.{n:09}Z" msg="{_QEMU[0]}" pid={n % 2}',
    ),
    "two events each": ("qemu", lambda n: f"{n}@1.000001:{_QEMU[0]} {_QEMU[0]}"),
    "nearly hot lines": ("qemu", lambda n: f"1@1.{n % 97:06}:{_QEMU[6]}" + " " * (n % 13 == 0)),
    "unreadable": ("qemu", lambda n: f"kvm_convert_memory start {n}"),
    "noise": ("qemu", lambda n: f"[  {n}.0] console"),
    "as many tasks": ("ftrace", lambda n: f"q-{n} ( {n}) [001] ..... 12.{n:06}: {_KERNEL[0]}"),
    "runs that break": (
        "ftrace",
        lambda n: f"q-82 ( 60) [001] ..... 12.{'x' * (n % 13 == 0):0>6}: {_KERNEL[6]}",
    ),
    "as many own targets": ("ramblock", lambda n: _OWN[2].replace('"a"', f'"{n}"')),
    "odd own lines": ("ramblock", lambda n: f'{{"t":1,"event":"odd{n}"}}'),
}


@pytest.mark.parametrize("case", _WIDE)
def test_four_times_the_lines_are_at_most_five_times_the_work(case: str) -> None:
    name, line = _WIDE[case]
    few, many = (
        _steps(name, "".join(f"{line(n)}\n" for n in range(count)).encode())
        for count in (1500, 6000)
    )
    assert many <= 5 * few


def test_names_do_not_fill_memory() -> None:
    """What a reader keeps is bounded, whatever a small file unpacks to."""
    lines = [
        f"Nov 24 03:08:30 n qemu[{n}]: kvm_convert_memory {'x' * 900}\n"
        f"c{n}-{n} ( {n}) [001] ..... 12.000001: kvm_exit: {'y' * 900}\n"
        for n in range(6000)
    ]
    data = "".join(lines).encode()
    assert len(gzip.compress(data)) < len(data) // 20
    reader = reader_of("qemu")
    tracemalloc.start()
    try:
        for position in range(0, len(data), 1 << 18):
            reader.feed(data[position : position + (1 << 18)])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 << 20


def test_numbers_are_of_64_bits() -> None:
    reader = reader_of("qemu")
    lines = (
        f"kvm_convert_memory start 0x{'f' * 17} size 0x1000 shared_to_private",
        f"kvm_convert_memory start 0x{'f' * 16} size 0x1000 shared_to_private",
        f"virtio_mem_send_response type={'1' * 5000}",
        f"1@{'1' * 5000}.000001:kvm_sev_init ",
    )
    assert len(reader.feed("\n".join(lines).encode() + b"\n")) == 1  # the reset, without a time
    assert reader.counts.unreadable_lines == 3


def test_every_event_of_the_table_has_a_meaning() -> None:
    assert _MEANINGS.keys() == EVENTS.keys()
    assert not EVENTS.keys() & IGNORED
    known: dict[object, set[str]] = {}
    for name, (function, _) in _MEANINGS.items():
        known.setdefault(function, set()).update(
            field for form in forms_of(name) for field in form.fields
        )
    for name, (function, fields) in _MEANINGS.items():
        assert known[function] >= set(fields), name
