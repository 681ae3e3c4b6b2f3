"""The fast way of reading text gives what the careful way gives, on everything there is."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramblock.trace.events import Source
from ramblock.trace.readers.base import TraceReader
from ramblock.trace.readers.hot import FastTextReader
from ramblock.trace.readers.text import TextReader
from trace_fuzz import FORMATS, make, play
from trace_samples import BLOCK, DATA, Shown, recording, show

_TEXTS = sorted(
    path.name for pattern in ("qemu-*.trace.gz", "ftrace-*.txt.gz") for path in DATA.glob(pattern)
)
_CHUNK = 1 << 18


def _all(reader: TraceReader, data: bytes) -> tuple[list[Shown], object, object]:
    found = []
    for position in range(0, len(data), _CHUNK):
        found += reader.feed(data[position : position + _CHUNK])
    found += reader.finish()
    return [(*show(event), event.source.guest) for event in found], reader.counts, reader.needs


def _both(data: bytes) -> list[Shown]:
    careful = _all(TextReader(Source("f", "qemu"), virtio_mem_block_size=BLOCK), data)
    fast = _all(FastTextReader(Source("f", "qemu"), virtio_mem_block_size=BLOCK), data)
    assert fast == careful
    return fast[0]


@pytest.mark.parametrize("name", _TEXTS)
def test_on_recordings(name: str) -> None:
    assert _both(recording(name))


@pytest.mark.parametrize("name", _TEXTS)
def test_on_mutations(name: str) -> None:
    data = bytearray(recording(name)[:200_000])
    chance = random.Random(name)
    for _ in range(len(data) // 500):
        data[chance.randrange(len(data))] = chance.choice(b"0123456789abcdefx=:- \n()'\r@")
    _both(bytes(data))


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=8, deadline=None)
def test_on_what_is_made(name: str, seed: int) -> None:
    play(name, make(name, seed, 350))


@pytest.mark.parametrize("bad", [None, 0, 7, 20, 59])
def test_on_a_run_of_our_scripts_maps(bad: int | None) -> None:
    lines = [
        f"ramblock-vfio map {time} 77 78 {0x100000 + time * 4096:#x} 0x1000 0x1000 0 qemu\n"
        for time in range(1000, 1060)
    ]
    if bad is not None:
        lines[bad] = lines[bad].replace(" 0 qemu", " -1 qemu")
    lines.append("ramblock-vfio unmap 2000 77 78 0x100000 0x3c000 0x3c000 0 qemu\n")
    assert len(_both("".join(lines).encode())) == 61


@pytest.mark.parametrize(
    "line",
    [
        "kvm_set_user_memory Slot#1 flags=0x4 gpa=0x0 size=0x1000 ua=0x7f2000000000 ret=0",
        "kvm_set_user_memory Slot#1 flags=0x4 gpa=0x0 size=0x1000 ua=0x7f20 ret=0 qemuPid=5",
        "kvm_sev_init ",
        "kvm_sev_init",
        "kvm_sev_initial x kvm_convert_memory start 0x0 size 0x1000 private_to_shared",
        "vfio_listener_region_skip SKIPPING kvm_convert_memory start 0x0 size 0x1000 no_word",
        "virtio_mem_send_response type=0 kvm_convert_memory start 0x0 size 0x9 shared_to_private",
        "ram_block_discard_range x@0x1000 + 0x2000: madvise: 1 fallocate: 0 ret: 0",
        "ram_block_discard_range x@0x1000 + 0x2000: madvise: 1 12.000100: map: IOMMU: iova=0x0",
        "kvm_sev_snp_launch_start ramblock-vfio map 1000 77 78 0x100000 0x1000 0x1000 0 qemu",
    ],
)
def test_on_other_events(line: str) -> None:
    """Only the head of such a line is read the fast way."""
    heads = ("", "60@1795489710.193122:", "2026-11-24T03:08:30.193122Z ")
    _both("".join(f"{head}{line}\n" for head in heads).encode())


@pytest.mark.parametrize(
    ("name", "share"), [("ftrace-type1.txt.gz", 20), ("qemu-exact.trace.gz", 10)]
)
def test_the_fast_way_is_taken(name: str, share: int) -> None:
    """Otherwise the tests above compare a thing with itself."""
    data = recording(name)
    careful = 0

    class Counted(FastTextReader):
        def _line(self, raw: bytes, number: int, found: list[object]) -> None:  # type: ignore[override]
            nonlocal careful
            careful += 1
            super()._line(raw, number, found)  # type: ignore[arg-type]

    reader = Counted(Source("f", "ftrace"))
    reader.feed(data)
    assert careful < reader.counts.lines // share
