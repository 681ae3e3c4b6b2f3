"""
What holds for every reader: any chunking, any bytes, and memory that does not grow with what is not
there.
"""

import random
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramblock.errors import TraceError
from ramblock.trace.audit import Audit
from ramblock.trace.readers.base import MAX_LINE
from trace_samples import READERS, as_shown, read, read_in_pieces, sample

NAMES = sorted(READERS)


@pytest.mark.parametrize("name", NAMES)
def test_sample_has_events(name: str) -> None:
    reader = READERS[name]()
    events = read(reader, sample(name))
    assert len(events) == reader.counts.events >= 4
    assert reader.counts.lines >= 4
    assert sum(reader.counts.by_name.values()) >= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "longest"), [(1, 1), (2, 7), (3, 300), (4, 70_000)])
def test_chunking_does_not_matter(name: str, seed: int, longest: int) -> None:
    data = sample(name, 400)
    whole, pieces = READERS[name](), READERS[name]()
    assert as_shown(read(whole, data)) == as_shown(read_in_pieces(pieces, data, seed, longest))
    assert whole.counts == pieces.counts


def _read_anything(name: str, data: bytes) -> None:
    """Whatever the bytes are: events, counts, or a TraceError; and an audit of the events."""
    reader = READERS[name]()
    audit = Audit()
    ended = None
    try:
        audit.feed(reader.feed(data[: len(data) // 2]))
        audit.feed(reader.feed(data[len(data) // 2 :]))
        audit.feed(reader.finish())
    except TraceError as error:
        ended = error
    if ended is not None:
        assert str(ended).startswith("f:")
        assert ended.path == "f"
    audit.finish()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=400))
@settings(max_examples=150)
def test_any_bytes(name: str, data: bytes) -> None:
    _read_anything(name, data)


# Words of the formats, so that more of what is made comes near to being a line.
_PARTS = st.one_of(
    st.binary(max_size=8),
    st.integers(-(1 << 70), 1 << 70).map(lambda number: str(number).encode()),
    st.integers(0, 1 << 70).map(lambda number: hex(number).encode()),
    st.sampled_from(
        (
            b'{"t":|"event":"map"|,|}|"iova":|"size":|"target":"x"|"gpa":|\n| |: |'
            b"kvm_convert_memory|start |size |shared_to_private|"
            b"2026-11-24T03:08:23.736102Z |vfio_user_dma_map|iova |flags |async_ops |"
            b"[000] |map: IOMMU: |iova=|paddr=| - |"
            b"ramblock-vfio map|ramblock-vfio unmap|python-62 (     62) |unmapped_size=|"
            b"kvm_vm_set_mem_attributes: | -- |[0x8]|-17|0|1"
        ).split(b"|")
    ),
)


@pytest.mark.parametrize("name", NAMES)
@given(parts=st.lists(_PARTS, max_size=40))
@settings(max_examples=150)
def test_any_words(name: str, parts: list[bytes]) -> None:
    _read_anything(name, b"".join(parts))


@pytest.mark.parametrize("name", NAMES)
def test_bits_that_flip(name: str) -> None:
    data = bytearray(sample(name, 200))
    chance = random.Random(name)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        _read_anything(name, bytes(damaged))


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere(name: str) -> None:
    """What was before the cut is read; at the cut there is an error, or a line that is counted."""
    data = sample(name, 60)
    full = as_shown(read(READERS[name](), data))
    for cut in random.Random(name).sample(range(len(data)), 100):
        reader = READERS[name]()
        found = as_shown(reader.feed(data[:cut]))
        assert found == full[: len(found)]
        with suppress(TraceError):
            assert len(reader.finish()) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_line_without_end_does_not_fill_memory(name: str) -> None:
    """Ten thousand pieces of 1 MiB, one and the same in memory: a line of 10 GiB."""
    piece = b"x" * (1 << 20)
    start = {"simpletrace": sample("simpletrace", 1), "ramblock": b'{"t":1,"event":"'}
    reader = READERS[name]()
    reader.feed(start.get(name, b""))
    tracemalloc.start()
    try:
        for _ in range(10 << 10):
            try:
                assert reader.feed(piece) == []
            except TraceError:
                assert name in start  # these have no next line at which to go on
                break
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MAX_LINE


@pytest.mark.parametrize("name", ["qemu", "ftrace", "bpftrace"])
def test_reading_goes_on_after_a_line_that_is_too_long(name: str) -> None:
    data = sample(name, 100)
    expected = [shown[3:] for shown in as_shown(read(READERS[name](), data))]
    reader = READERS[name]()
    events = reader.feed(b"y" * (3 * MAX_LINE)) + reader.feed(b"y\n" + data) + reader.finish()
    assert [shown[3:] for shown in as_shown(events)] == expected
    assert reader.counts.examples[0] == (1, "y" * 120)
