# SPDX-License-Identifier: Apache-2.0
"""Which format a trace has, from how it begins."""

from __future__ import annotations

from ramblock.errors import TraceError
from ramblock.trace.bpftrace import BpftraceReader
from ramblock.trace.events import Source
from ramblock.trace.ftrace import FtraceReader
from ramblock.trace.qemu import QemuReader
from ramblock.trace.reader import TraceReader
from ramblock.trace.simpletrace import HEADER_MAGIC

__all__ = ["detect"]

_SHOWN = 80


def detect(head: bytes) -> str:
    """
    Name the format of a trace.

    :param head: Its first bytes; 64 KiB are enough.
    :raises TraceError: It is none that is known.
    """
    if head[8:16] == HEADER_MAGIC.to_bytes(8, "little"):
        return "simpletrace"
    if head.lstrip().startswith(b"{"):
        return "ramblock"
    scores = {name: _score(reader, head) for name, reader in _candidates().items()}
    best = max(scores, key=scores.__getitem__)
    if scores[best]:
        return best
    if head.startswith(b"# tracer:"):
        return "ftrace"
    first = head.split(b"\n", 1)[0][:_SHOWN].decode(errors="backslashreplace")
    raise TraceError(
        f"its format is not known; it begins with {first!r}, expected a trace of QEMU (text or"
        " binary), of Linux (ftrace, trace-cmd,"
        " perf script, our bpftrace script) or of ramblock",
        line=1,
    )


def _candidates() -> dict[str, TraceReader]:
    source = Source("", "")
    return {
        "qemu": QemuReader(source),
        "ftrace": FtraceReader(source),
        "bpftrace": BpftraceReader(source),
    }


def _score(reader: TraceReader, head: bytes) -> int:
    """Count the lines that a reader knows."""
    reader.feed(head)
    return sum(reader.counts.by_name.values())
