# SPDX-License-Identifier: Apache-2.0
"""
The lines of our bpftrace script on VFIO type1 (``ramblock check --how bpftrace``).

A line for each call that has returned:

    ramblock-vfio map|unmap TIME_NS PID TID IOVA SIZE DONE_BYTES RESULT COMMAND
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ramblock.trace.events import Map, Source, Unmap

__all__ = ["read_call"]

_LINE = re.compile(
    rb"(?:^|[^\n]{0,256}\s)ramblock-vfio (map|unmap) (\d{1,19}) (\d{1,10}) \d{1,10}"
    rb" 0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) (-?\d{1,10})(?![^\s])"
)
_NAME = re.compile(rb"(?:^|[^\n]{0,256}\s)ramblock-vfio (map|unmap) ")
_EVERYTHING = 1 << 64


def read_call(
    raw: bytes, number: int, guest: Callable[[str | None], Source]
) -> tuple[str, Map | Unmap | None] | None:
    """Read a line; return the call's name, and the event if the rest can be read. None: no call."""
    if b"ramblock-vfio " not in raw:
        return None
    match = _LINE.match(raw)
    if match is None:
        named = _NAME.match(raw)
        return None if named is None else (named[1].decode(), None)
    name, time, process = match[1].decode(), int(match[2]), match[3].decode()
    start, size, done = (int(group, 16) for group in match.group(4, 5, 6))
    worked = int(match[7]) == 0
    target = f"type1 of process {process}"
    end = start + size
    if end > _EVERYTHING:
        return name, None
    source = guest(process)
    if name == "map":
        return name, Map(time, source, number, target, start, end, done=worked)
    # VFIO_DMA_UNMAP_FLAG_ALL names address and size 0.
    return name, Unmap(
        time, source, number, target, start, end if size else _EVERYTHING, done, done=worked
    )
