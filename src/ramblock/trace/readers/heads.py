# SPDX-License-Identifier: Apache-2.0
"""
The part of a line that its loggers wrote: a time, the guest's process, a thread.

QEMU's message may come through any number of loggers (syslog, journald, kata's shim, virt-launcher,
kubectl, docker, a kernel's ring buffer), each of which puts something before it, and some behind.
The time is the innermost, since that is the nearest to the event.
"""

from __future__ import annotations

import re
from datetime import date
from typing import NamedTuple

__all__ = ["Head", "Heads", "unescaped", "without_colours"]

# Bytes that are looked at: stamps of loggers stand at the beginning of a line, QEMU's beside the
# event, and fields of structured logs behind it.
_FIRST, _LAST, _BEHIND = 512, 1024, 1024

# QEMU to 10.0, and any version's `log` backend with `-msg timestamp`: the number is that of the
# *thread* (scripts/tracetool/backend/log.py writes qemu_get_thread_id()).
_QEMU = re.compile(rb"(?<!\d)(\d{1,10})@(\d{1,11})\.(\d{6}):\Z")
# scripts/qemu-trace-stap writes pid() and the time in nanoseconds.
_STAP = re.compile(rb"(?<!\d)(\d{1,10})@(\d{1,20}) {1,2}\Z")
# util/message.c, with `-msg` of QEMU 11: `(thread's number:thread's name): `.
_THREAD = re.compile(rb"\((\d{1,10}):([^\n]{0,64}?)\): ?\Z")
# GLib leaves the fraction out where it is zero.
_ISO = re.compile(
    rb"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?"
    rb" ?(Z|[+-]\d\d(?::?\d\d)?)?(?!\d)"
)
_KEYED_ISO = re.compile(
    rb'"@?(?:timestamp|time|ts)" {0,4}: {0,4}"'
    rb"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?"
    rb" ?(Z|[+-]\d\d(?::?\d\d)?)?(?!\d)"
)
_JOURNAL_JSON = re.compile(rb'"__REALTIME_TIMESTAMP" {0,4}: {0,4}"(\d{10})(\d{6})"')
_UNIX = re.compile(rb"(?<![\d.])(\d{10})\.(\d{1,9})(?!\d)")
_SINCE_BOOT = re.compile(rb"[^\[]{0,64}\[ {0,8}(\d{1,10})\.(\d{1,9})\]")
# The month is in any language: journald asks the locale.
_SYSLOG = re.compile(
    rb"(?:<\d{1,3}>)?(\S{1,24}) {1,2}(\d{1,2}) (\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))? "
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTHS_KEPT = 64

_KATA_PROCESS = re.compile(rb'qemuPid"?\s{0,2}[=:]\s{0,2}"?(\d{1,10})')
_LOGGED_PROCESS = re.compile(rb"(?i:qemu|kvm)[\w.+-]{0,32}\[(\d{1,10})\]:")
_JOURNAL_COMMAND = re.compile(
    rb'"(?:_COMM|SYSLOG_IDENTIFIER)" {0,4}: {0,4}"[^"]{0,64}(?i:qemu|kvm)'
)
_JOURNAL_PROCESS = re.compile(rb'"_PID" {0,4}: {0,4}"(\d{1,10})"')
_CLOCKS = re.compile(rb"\d\d:\d\d:\d\d[\d.,]*")
_ANSI = re.compile(rb"\x1b\[[0-9;?]{0,16}[A-Za-z]")
_ESCAPES = re.compile(rb"\\{1,16}(?:u(0027|0022|003c|003e|0026|001b)|([\"'/]))")
_DAY = 86_400
_EPOCH = date(1970, 1, 1).toordinal()


def without_colours(raw: bytes) -> bytes:
    """Return a line without the colours of a terminal."""
    return _ANSI.sub(b"", raw) if b"\x1b" in raw else raw


def unescaped(raw: bytes) -> bytes:
    """Return a line without JSON's escapes of what QEMU writes, and without colours in them."""
    return without_colours(_ESCAPES.sub(_unescape, raw))


def _unescape(match: re.Match[bytes]) -> bytes:
    return match[2] or bytes([int(match[1], 16)])


class Head(NamedTuple):
    """What stands around an event in its line."""

    time: int | None
    process: str | None
    """That runs the guest."""
    thread: str | None
    """That wrote the event."""
    logger: bytes
    """What the loggers wrote, without their times: two of them differ here."""
    fine: bool
    """Whether the time tells two events of one second apart."""


class Heads:
    """Reads them; it remembers the last second, and months of other languages."""

    def __init__(self) -> None:
        #: The newest second of an ISO time, without its zone, and its nanoseconds.
        self.second: tuple[bytes, bytes | None] = (b"", None)
        self.second_ns: int | None = None
        self._months: dict[bytes, int] = {}

    def read(self, head: bytes, tail: bytes) -> Head:
        """
        Read what stands before an event, and behind it.

        A date that is none (the 99th of a month) counts as the time before.
        """
        if not head:
            return Head(None, None, None, b"", fine=False)
        near, first, tail = head[-_LAST:], head[:_FIRST], tail[:_BEHIND]
        qemu = _QEMU.search(near)
        if qemu is not None:
            stamp_ns = int(qemu[2]) * 10**9 + int(qemu[3]) * 1000
            process = self._process(first, near, tail)
            return Head(
                stamp_ns, process, qemu[1].decode(), near[: qemu.start()][:_FIRST], fine=True
            )
        stap = _STAP.search(near)
        if stap is not None:
            return Head(int(stap[2]), stap[1].decode(), None, near[: stap.start()], fine=True)
        thread = _THREAD.search(near)
        if thread is not None:
            near = near[: thread.start()]
        time, fine, stamp = self._time(first, near, tail)
        return Head(
            time,
            self._process(first, near, tail),
            None if thread is None else thread[1].decode(),
            _CLOCKS.sub(b"", first.replace(stamp, b"") if stamp else first).strip(),
            fine,
        )

    def _time(self, first: bytes, near: bytes, tail: bytes) -> tuple[int | None, bool, bytes]:
        """Return the time, whether it has a fraction, and its text."""
        iso = None
        for match in _ISO.finditer(near):
            iso = match  # the last
        if iso is None and first.lstrip()[:1] == b"{":
            iso = _KEYED_ISO.search(tail)
        if iso is not None:
            base = self.iso_second(iso[1], iso[3])
            time = None if base is None else base + _fraction(iso[2])
            return time, iso[2] is not None, iso[0]
        since_boot = _SINCE_BOOT.match(first)
        told = _JOURNAL_JSON.search(first) or _JOURNAL_JSON.search(tail) or _UNIX.search(near)
        told = told or since_boot
        if told is not None:
            return int(told[1]) * 10**9 + _fraction(told[2]), True, told[0]
        syslog = _SYSLOG.match(first)
        if syslog is not None:
            month, day, hour, minute, second, fraction = syslog.groups()
            # The year is not told. A leap year has all days.
            days = date(2000, self._month(month), 1).toordinal() + int(day) - 1
            seconds = days * _DAY + int(hour) * 3600 + int(minute) * 60 + int(second)
            time = (seconds - _EPOCH * _DAY) * 10**9 + _fraction(fraction)
            return time, fraction is not None, b""
        return None, False, b""

    def iso_second(self, text: bytes, zone: bytes | None) -> int | None:
        """Return the nanoseconds of a second such as ``2026-11-24T03:08:30``."""
        if (text, zone) != self.second:
            try:
                days = date(int(text[:4]), int(text[5:7]), int(text[8:10])).toordinal() - _EPOCH
            except ValueError:
                return self.second_ns
            seconds = int(text[11:13]) * 3600 + int(text[14:16]) * 60 + int(text[17:19])
            self.second = text, zone
            self.second_ns = (days * _DAY + seconds - _offset(zone)) * 10**9
        return self.second_ns

    def _month(self, word: bytes) -> int:
        digits = re.match(rb"\d{1,2}", word)  # 11月
        if digits is not None and 1 <= int(digits[0]) <= 12:
            return int(digits[0])
        text = word.decode(errors="replace").lower()[:3]
        if text in _MONTHS:
            return _MONTHS.index(text) + 1
        # Of another language: those that come later are later.
        if word not in self._months and len(self._months) < _MONTHS_KEPT:
            self._months[word] = len(self._months)
        return self._months.get(word, 0) % 12 + 1

    @staticmethod
    def _process(first: bytes, near: bytes, tail: bytes) -> str | None:
        match = _KATA_PROCESS.search(tail) or _KATA_PROCESS.search(near)
        match = match or _LOGGED_PROCESS.search(first)
        is_json = match is None and first.lstrip()[:1] == b"{"
        if is_json and (_JOURNAL_COMMAND.search(first) or _JOURNAL_COMMAND.search(tail)):
            match = _JOURNAL_PROCESS.search(first) or _JOURNAL_PROCESS.search(tail)
        return None if match is None else match[1].decode()


def _fraction(digits: bytes | None) -> int:
    """Nanoseconds of the digits behind a second's dot."""
    return 0 if digits is None else int(digits.ljust(9, b"0"))


def _offset(zone: bytes | None) -> int:
    """Seconds that a zone's clock is ahead."""
    if zone is None or zone == b"Z":
        return 0
    digits = zone[1:].replace(b":", b"").ljust(4, b"0")
    seconds = int(digits[:2]) * 3600 + int(digits[2:]) * 60
    return -seconds if zone.startswith(b"-") else seconds
