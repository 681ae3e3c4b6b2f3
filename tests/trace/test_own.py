"""Our own format: what its reader refuses, and what it lets pass."""

import pytest

from ramblock.errors import TraceError
from trace_samples import as_shown, read, reader_of

_START = b'{"t":1,"event":"start","version":1,"blocks":[{"name":"low","gpa":0,"size":4096,"confidential":true}],"targets":{"iommu0":"soft"}}\n'


def _shown(data: bytes) -> list[tuple[object, ...]]:
    return as_shown(read(reader_of("ramblock"), data))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"t":5,"event":"attributes","gpa":0,"size":8192,"private":true}', ("Attributes", 0, 8192, True, None)),
        (b'{"t":5,"event":"map","target":"a","iova":4096,"size":4096,"writable":false}', ("Map", "a", 4096, 8192, False, True, None, None)),
        (b'{"t":5,"event":"unmap","target":"a","iova":0,"size":4096,"unmapped":0}', ("Unmap", "a", 0, 4096, 0, True)),
        (b'{"t":5,"event":"unmap","target":"a","iova":0,"size":0,"unmapped":9}', ("Unmap", "a", 0, 1 << 64, 9, True)),
        (b'{"t":5,"event":"fault","target":"a","iova":0,"size":8,"write":true}', ("Access", "a", 0, 8, True, True, None)),
        (b'{"t":5,"event":"free","side":"private","gpa":0,"size":4096}', ("Discard", 0, 4096, False, None, True)),
        (b'{"t":5,"event":"state_change","block":"low","offset":0,"size":4096,"before":"shared","after":"private"}', ("StateChange", "low", 0, 4096, True)),
        (b'{"t":5,"event":"conversion","gpa":0,"size":4096,"to":"shared","result":"done","took":2}', ("ConversionEnd", 0, 4096, False, 3, "done")),
        (b'{"t":5,"event":"conversion","gpa":"0x1ffffffffffffffff","size":4096,"to":"shared","result":"refused","took":0}', ("ConversionEnd", 0, 0, False, 5, "refused")),
        (b'{"t":5,"event":"connect","target":"client1"}', ("Attach", "client1", None)),
        (b'{"t":5,"event":"disconnect","target":"client1","reason":"x"}', ("Detach", "client1")),
        (b'{"t":5,"event":"detach","target":"iommu0"}', ("Detach", "iommu0")),
        (b'{"t":5,"event":"violation","target":"a","rule":"overlap","iova":0,"size":16,"reason":"r"}', ("Remark", "overlap", "r", "a", 0, 16, False, False)),
        (b'{"t":5,"event":"summary","whatever":[1]}', None),
    ],
)  # fmt: skip
def test_line(line: bytes, expected: tuple[object, ...] | None) -> None:
    shown = _shown(_START + line)[1:]
    assert [(each[0], *each[3:]) for each in shown] == ([] if expected is None else [expected])
    assert all(each[1:3] == (5, 2) for each in shown)


def test_start_places_blocks() -> None:
    (start,) = _shown(_START)
    blocks = start[3]
    assert isinstance(blocks, tuple)
    (block,) = blocks
    assert (block.name, block.start, block.end, block.confidential) == ("low", 0, 4096, True)
    assert start[4:] == (("iommu0",), None, False, True)


def test_events_and_fields_of_the_future_are_let_pass() -> None:
    reader = reader_of("ramblock")
    data = (
        _START
        + b'{"t":2,"event":"teleport","to":1}\n\n{"t":3,"event":"connect","target":"x","new":1}\n'
    )
    assert [each[0] for each in as_shown(read(reader, data))] == ["Layout", "Attach"]
    assert (reader.counts.lines, reader.counts.unknown) == (4, 1)
    assert reader.counts.examples == [(2, '{"t":2,"event":"teleport","to":1}')]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "f:2: not a line of a ramblock trace"),
        (b"[]", "f:2: not a line of a ramblock trace"),
        (b'{"t":5,"event":"map","target":"a","iova":0}', "f:2: .*missing required field `size`"),
        (b'{"t":5,"event":"map","target":"a","iova":-1,"size":1}', "f:2: .*iova"),
        (b'{"t":5,"event":"map","target":"a","iova":"0x1","size":1}', "f:2: .*iova"),
        (b'{"t":5,"event":"start","version":2}', "f:2: version 2 of the format, expected 1"),
        (b'{"t":5,"event":"free","side":"left","gpa":0,"size":1}', "f:2: .*left"),
        (b"\xff\xfe", "f:2: not a line of a ramblock trace"),
    ],
)
def test_a_broken_line_ends_the_reading(line: bytes, message: str) -> None:
    reader = reader_of("ramblock")
    assert len(reader.feed(_START + line + b"\n" + _START)) == 1
    with pytest.raises(TraceError, match=message) as caught:
        reader.finish()
    assert (caught.value.path, caught.value.line) == ("f", 2)
    with pytest.raises(TraceError, match=message):
        reader.feed(_START)


def test_a_last_line_that_is_cut() -> None:
    reader = reader_of("ramblock")
    assert len(reader.feed(_START + b'{"t":5,"event":"ma')) == 1
    with pytest.raises(TraceError, match="f:2: the last line is cut"):
        reader.finish()
