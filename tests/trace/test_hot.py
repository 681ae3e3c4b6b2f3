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


def test_the_fast_way_is_taken() -> None:
    """Otherwise the tests above compare a thing with itself."""
    data = recording("ftrace-type1.txt.gz")
    careful = 0

    class Counted(FastTextReader):
        def _line(self, raw: bytes, number: int, found: list[object]) -> None:  # type: ignore[override]
            nonlocal careful
            careful += 1
            super()._line(raw, number, found)  # type: ignore[arg-type]

    reader = Counted(Source("f", "ftrace"))
    reader.feed(data)
    assert careful < reader.counts.lines // 20
