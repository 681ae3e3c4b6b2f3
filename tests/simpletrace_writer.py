"""
Writes QEMU's binary trace, from its text.

It shares nothing with the reader but QEMU's documentation of both: docs/devel/tracing.rst and
trace/simple.c. Arguments are taken off a line by what they look like.
"""

import re
import struct
from collections.abc import Iterable
from datetime import UTC, datetime

__all__ = ["HEADER", "dropped", "event", "header", "mapping", "simpletrace_of"]

_ISO = re.compile(r"(\S+)\.(\d{6})Z (\w+) ?(.*)", re.DOTALL)
# Which of an event's arguments are strings; all others are words, as they come.
_STRINGS = {
    "kvm_convert_memory": re.compile(r"(0x[0-9a-f]+|(?:shared|private)_to_\w+)"),
    "ram_block_attributes_state_change": re.compile(r"(0x[0-9a-f]+|(?<=')\w+(?='))"),
    "ram_block_discard_shared_range": re.compile(r"(^[^@]*(?=@)|0x[0-9a-f]+|(?<=: )-?\d+)"),
}
_WORDS = re.compile(r"(0x[0-9a-f]+|\(nil\)|(?<![\w#])-?\d+|(?<=#)\d+)")


def header(version: int = 4) -> bytes:
    """Return a header of this version."""
    return struct.pack("<QQQ", (1 << 64) - 1, 0xF2B177CB0AA429B4, version)


HEADER = header()


def mapping(number: int, name: str) -> bytes:
    """Give an event's number a name."""
    return struct.pack("<QQI", 0, number, len(name)) + name.encode()


def event(number: int, time: int, *arguments: int | bytes) -> bytes:
    """Return an event's record."""
    body = b"".join(
        struct.pack("<I", len(each)) + each
        if isinstance(each, bytes)
        else struct.pack("<Q", each % (1 << 64))
        for each in arguments
    )
    return struct.pack("<QQQII", 1, number, time, 24 + len(body), 4711) + body


def dropped(time: int, count: int) -> bytes:
    """Return the record that stands for events that were lost."""
    return event((1 << 64) - 2, time, count)


def simpletrace_of(lines: Iterable[str]) -> bytes:
    """Return the binary trace of a text trace with times (``-msg timestamp=on``)."""
    numbers: dict[str, int] = {}
    records = [HEADER]
    for line in lines:
        match = _ISO.fullmatch(line.rstrip("\n"))
        assert match is not None, line
        second, micros, name, text = match.groups()
        if name not in numbers:
            numbers[name] = len(numbers)
            records.append(mapping(numbers[name], name))
        moment = datetime.fromisoformat(second).replace(tzinfo=UTC)
        time = int(moment.timestamp()) * 10**9 + int(micros) * 1000
        records.append(event(numbers[name], time, *_arguments(name, text)))
    return b"".join(records)


def _arguments(name: str, text: str) -> list[int | bytes]:
    if name == "vfio_user_version":
        return [0, 0, text.encode()]
    found = _STRINGS.get(name, _WORDS).findall(text.replace("size=", " size="))
    return [_argument(each) for each in found]


def _argument(text: str) -> int | bytes:
    if text == "(nil)":
        return 0
    try:
        return int(text, 0)
    except ValueError:
        return text.encode()
