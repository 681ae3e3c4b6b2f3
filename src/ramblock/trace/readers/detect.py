# SPDX-License-Identifier: Apache-2.0
"""Which format a recording has, from how it begins; and files that are none, by their names."""

from __future__ import annotations

import re

from ramblock.errors import TraceError
from ramblock.trace.events import Source
from ramblock.trace.readers import registry

__all__ = ["HEAD", "TEXT", "detect", "format_of", "not_known"]

#: Bytes that are looked at.
HEAD = 1 << 16
#: The reader of text of any kind: the event that decides may be far behind.
TEXT = "qemu"

_SIMPLETRACE_MAGIC = (0xF2B177CB0AA429B4).to_bytes(8, "little")
_OWN = re.compile(rb'\s{0,64}\{[^\n]{0,4096}?"event"\s{0,4}:')
_SHOWN = 80
# (beginning, what it is, what to do)
_WRONG = (
    (b"PERFILE2", "perf's own file", "perf script -i FILE -F comm,pid,tid,cpu,time,event,trace"),
    (b"2ELIFREP", "perf's own file", "perf script -i FILE -F comm,pid,tid,cpu,time,event,trace"),
    (b"\x17\x08\x44tracing", "trace-cmd's own file", "trace-cmd report -i FILE"),
    (b"LPKSHHRH", "a file of the systemd journal", "journalctl --file FILE -o short-iso-precise"),
    (b"PK\x03\x04", "a zip archive", "unzip -p FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so FILE"),
    (b"\xff\xfe", "text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\xfe\xff", "text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\x7fELF", "a program or a core dump", ""),
    (b"%PDF", "a PDF", ""),
)
_FIRST = 1 << 12
_HTML = re.compile(rb"\s{0,64}<(?:!doctype html|html|head|body)\b", re.IGNORECASE)
_ACCEPTED = (
    "expected a trace of QEMU (text or binary), of Linux (ftrace, trace-cmd, perf script, our"
    " bpftrace script) or of ramblock"
)


def detect(head: bytes) -> str | None:
    """
    Name the format of a trace; None: it is text without an event so far.

    :param head: Its first bytes; :data:`HEAD` are enough.
    :raises TraceError: It is none that can be read, and will not become one.
    """
    if head[8:16] == _SIMPLETRACE_MAGIC:
        return "simpletrace"
    if _OWN.match(head) is not None:
        return "ramblock"
    reader = registry.make_reader(TEXT, Source("", ""))
    for part in (head[:_FIRST], head[_FIRST:]):  # the careful reader is slow, and little enough
        reader.feed(part)
        if reader.recognized:
            return format_of(reader.counts.by_name)
    if head.startswith(b"# tracer:"):
        return "ftrace"
    other = registry.claim(head)
    if other is not None:
        return other
    wrong = _wrong_kind(head)
    if wrong is not None:
        raise wrong
    if head.count(b"\0") > len(head) // 10:  # a console's log may have some
        raise not_known(head)
    return None


def format_of(by_name: dict[str, int]) -> str:
    """Name the format of a text by the events that it has most of."""
    from ramblock.trace.readers.qemu_table import EVENTS, IGNORED

    times = {"qemu": 0, "ftrace": 0, "bpftrace": 0}
    for name, count in by_name.items():
        if name in EVENTS or name in IGNORED or name == "message":
            times["qemu"] += count
        elif name.startswith("type1 "):
            times["bpftrace"] += count
        else:
            times["ftrace"] += count
    return max(times, key=times.__getitem__)


def not_known(head: bytes) -> TraceError:
    """Make the error for a file in which no event was found."""
    first = head.split(b"\n", 1)[0][:_SHOWN].decode(errors="backslashreplace")
    return TraceError(
        f"its format is not known; it begins with {first!r}, {_ACCEPTED}",
        line=1,
    )


def _wrong_kind(head: bytes) -> TraceError | None:
    found = next(((what, how) for magic, what, how in _WRONG if head.startswith(magic)), None)
    if found is None and _HTML.match(head) is not None:
        found = "a web page (HTML)", "save the log itself, not the page that shows it"
    if found is None and _is_utf16(head):
        found = "text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE"
    if found is None:
        return None
    what, how = found
    hint = f"; try: {how}" if how else ""
    return TraceError(f"this is {what}, not a trace{hint}", line=1)


def _is_utf16(head: bytes) -> bool:
    """Whether every other byte is zero, and no other: UTF-16 of a western text, without a mark."""
    even, odd = head[:64:2], head[1:64:2]
    return len(odd) >= 8 and ((not any(even) and all(odd)) or (not any(odd) and all(even)))
