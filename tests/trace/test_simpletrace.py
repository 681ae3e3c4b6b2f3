"""QEMU's binary trace, written by a writer that shares nothing with the reader."""

import struct

import pytest

from ramblock.errors import TraceError
from ramblock.trace.readers.base import TraceReader
from simpletrace_writer import HEADER, dropped, event, header, mapping, simpletrace_of
from trace_samples import READERS, as_shown, qemu_lines, read, reader_of

_MAP = mapping(5, "iommufd_backend_map_dma")
_MAP_EVENT = event(5, 1000, 10, 2, 0x4000, 0x1000, 0x7F0000004000, 0, -17)


def _reader() -> TraceReader:
    return reader_of("simpletrace")


@pytest.mark.parametrize("name", ["qemu-lenient.trace.gz", "qemu-exact.trace.gz"])
def test_the_same_as_the_text(name: str) -> None:
    """
    Lines of the text are events of the binary trace, but for messages, which it does not have.
    """
    lines = qemu_lines(name)
    text = read(READERS["qemu"](), "\n".join(lines).encode())
    binary = read(READERS["simpletrace"](), simpletrace_of(lines))
    assert len(text) > 100
    assert as_shown(binary) == as_shown(text)


def test_signs_and_results() -> None:
    (shown,) = as_shown(read(_reader(), HEADER + _MAP + _MAP_EVENT))
    assert shown == (
        "Map",
        1000,
        1,
        "iommufd=10 ioas=2",
        0x4000,
        0x5000,
        True,
        False,
        None,
        0x7F0000004000,
    )


def test_a_slot_without_guest_memfd() -> None:
    """Its descriptor is -1 in 32 bits, which the binary format writes as a word."""
    name = mapping(1, "kvm_set_user_memory")
    for number, confidential in ((0xFFFFFFFF, False), ((1 << 64) - 1, False), (9, True)):
        record = event(1, 5, 0, 3, 4, 0, 0x1000, 0x7F0000000000, number, 0, 0)
        ((*_, blocks, _targets, _unmap, _removed, _ends),) = as_shown(
            read(_reader(), HEADER + name + record)
        )
        assert blocks[0].confidential is confidential  # type: ignore[index]


def test_strings() -> None:
    name = mapping(1, "ram_block_attributes_state_change")
    record = event(1, 5, 0x1000, 0x1000, b"populated", b"discarded")
    (shown,) = as_shown(read(_reader(), HEADER + name + record))
    assert shown[3:] == (None, 0x1000, 0x2000, True)


def test_an_unknown_word_is_no_state() -> None:
    reader = _reader()
    name = mapping(1, "ram_block_attributes_state_change")
    good = event(1, 5, 0x1000, 0x1000, b"mixture", b"populated")
    bad = event(1, 5, 0x1000, 0x1000, b"populated", b"private")
    assert len(read(reader, HEADER + name + good + bad + good)) == 2
    assert [line for line, _ in reader.counts.unreadable] == [2]


def test_events_that_were_dropped() -> None:
    (remark,) = as_shown(read(_reader(), HEADER + dropped(7, 41)))
    assert remark[0] == "Remark"
    assert "41" in str(remark[4])
    assert remark[-1] is True


def test_events_that_are_not_known_are_counted() -> None:
    reader = _reader()
    other = mapping(1, "memory_region_ops_write")
    wrong_arguments = event(5, 3, 1, 2)
    assert (
        read(reader, HEADER + other + event(1, 1, 2, 3) + event(77, 2) + _MAP + wrong_arguments)
        == []
    )
    assert reader.counts.unknown == 2
    assert reader.counts.examples == [(1, "memory_region_ops_write"), (2, "event number 0x4d")]
    assert reader.counts.unreadable == [(3, "iommufd_backend_map_dma")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0" * 64, "f:1: no trace of QEMU's `simple` backend, at byte 0"),
        (header(3), "f:1: version 3 of the format, expected 4, at byte 0"),
        (HEADER + struct.pack("<Q", 2), "f:1: record of type 0x2, expected 0 or 1, at byte 24"),
        (HEADER + struct.pack("<QQQII", 1, 5, 0, 23, 0), "f:1: a record of 23 bytes, at byte 24"),
        (
            HEADER + struct.pack("<QQQII", 1, 5, 0, 1 << 31, 0),
            "f:1: a record of 2147483648 bytes, at byte 24",
        ),
        (
            HEADER + struct.pack("<QQI", 0, 5, 1 << 31),
            "an event whose name has 2147483648 bytes",
        ),
        (b"", "f:1: the trace ends in the middle of a record, at byte 0"),
        (HEADER + _MAP + _MAP_EVENT[:-1], "f:1: the trace ends in the middle of a record, at byte"),
    ],
)
def test_what_cannot_be_read(data: bytes, message: str) -> None:
    reader = _reader()
    reader.feed(data)
    with pytest.raises(TraceError) as caught:
        reader.finish()
    assert message in str(caught.value)
    assert (caught.value.path, caught.value.line) == ("f", 1)


def test_what_comes_before_an_error_is_read() -> None:
    reader = _reader()
    assert len(reader.feed(HEADER + _MAP + _MAP_EVENT + struct.pack("<Q", 9))) == 1
    with pytest.raises(TraceError, match="record of type 0x9"):
        reader.feed(_MAP_EVENT)
