# SPDX-License-Identifier: Apache-2.0
"""
A trace for the Perfetto UI, in the Trace Event Format (JSON), which it opens as it is.

Conversions are slices, findings instants (and windows slices of their own track), bytes shared and
bytes mapped by each target are counters. It is written while the audit runs, so its memory does not
grow with the trace.
"""

from __future__ import annotations

from typing import IO, Any

from ramblock.text import encode_for_people
from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import FAILURES, Finding
from ramblock.trace.ranges import RangeMap

__all__ = ["PerfettoWriter"]

_PROCESS = 1
_CONVERSIONS, _FAULTS, _FIRST_TARGET = 1, 2, 10
_HELD = object()


class PerfettoWriter:
    """
    Watches an audit (:class:`~ramblock.trace.observer.AuditObserver`) and writes its events.

    :param stream: Stays open; :meth:`close` completes the file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._first = True
        self._shared: RangeMap[object] = RangeMap()
        self._shared_bytes = 0
        self._mapped: dict[str, RangeMap[object]] = {}
        self._mapped_bytes: dict[str, int] = {}
        self._tracks: dict[str, int] = {}
        stream.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')
        self._name("process_name", 0, "ramblock check")
        self._name("thread_name", _CONVERSIONS, "conversions")
        self._name("thread_name", _FAULTS, "DMA faults")

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        """Note that pages are now private or shared."""
        before = _covered(self._shared, start, end)
        self._shared.set(start, end, None if private else _HELD)
        after = 0 if private else end - start
        if after != before:
            self._shared_bytes += after - before
            self._counter(time, "shared bytes", self._shared_bytes)

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target mapped a range."""
        mappings = self._mapped.setdefault(target, RangeMap())
        added = end - start - _covered(mappings, start, end)
        mappings.set(start, end, _HELD)
        self._count_mapped(time, target, added)

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target unmapped a range."""
        mappings = self._mapped.get(target)
        if mappings is None:
            return
        removed = _covered(mappings, start, end)
        mappings.set(start, end, None)
        self._count_mapped(time, target, -removed)

    def converted(self, event: ConversionEnd) -> None:
        """Write a conversion."""
        if event.time is None:
            return
        began = event.time if event.began is None else event.began
        self._write(
            ph="X",
            ts=began / 1000,
            dur=(event.time - began) / 1000,
            tid=_CONVERSIONS,
            name="to private" if event.private else "to shared",
            cat="conversion",
            args={
                "gpa": f"{event.start:#x}",
                "size": event.end - event.start,
                "result": event.result,
                "line": str(event.origin),
            },
        )

    def accessed(self, event: Access) -> None:
        """Write a fault."""
        if event.refused and event.time is not None:
            what = "write" if event.write else "read"
            self._instant(event.time, _FAULTS, f"{what} refused", f"{event.start:#x}", event.target)

    def found(self, finding: Finding) -> None:
        """Write a finding: an instant at its begin, and a slice for its window."""
        if finding.since is None:
            return
        track = self._track(finding.target or "the trace")
        args = {
            "gpa": f"[{finding.start:#x}, {finding.end:#x})",
            "target": finding.target,
            "opened": str(finding.opened),
            "closed": None if finding.closed is None else str(finding.closed),
            "note": finding.note,
            "failure": finding.kind in FAILURES,
            "device": finding.device,
            "grace": finding.grace,
        }
        name = str(finding.kind)
        common = {"tid": track, "name": name, "cat": "finding", "args": args}
        self._write(ph="i", s="t", ts=finding.since / 1000, **common)
        if finding.duration:
            # Windows of one target overlap, which slices of one track may not: asynchronous ones
            # may.
            number = f"{finding.start:#x}/{finding.since}"
            self._write(ph="b", id=number, ts=finding.since / 1000, **common)
            end = finding.since + finding.duration
            self._write(ph="e", id=number, ts=end / 1000, tid=track, name=name, cat="finding")

    def close(self) -> None:
        """Complete the file."""
        self._stream.write(b"\n]}\n")

    def _track(self, name: str) -> int:
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = _FIRST_TARGET + len(self._tracks)
            self._name("thread_name", track, f"findings: {name}")
        return track

    def _count_mapped(self, time: int, target: str, change: int) -> None:
        if change:
            self._mapped_bytes[target] = self._mapped_bytes.get(target, 0) + change
            self._counter(time, f"mapped bytes: {target}", self._mapped_bytes[target])

    def _counter(self, time: int, name: str, value: int) -> None:
        self._write(ph="C", ts=time / 1000, name=name, args={"bytes": value})

    def _instant(self, time: int, track: int, name: str, address: str, target: str) -> None:
        args = {"iova": address, "target": target}
        self._write(ph="i", s="t", ts=time / 1000, tid=track, name=name, cat="fault", args=args)

    def _name(self, kind: str, track: int, name: str) -> None:
        self._write(ph="M", tid=track, name=kind, args={"name": name})

    def _write(self, **fields: Any) -> None:
        if not self._first:
            self._stream.write(b",\n")
        self._first = False
        self._stream.write(encode_for_people({"pid": _PROCESS, **fields}))


def _covered(ranges: RangeMap[object], start: int, end: int) -> int:
    return sum(high - low for low, high, _ in ranges.pieces(start, end))
