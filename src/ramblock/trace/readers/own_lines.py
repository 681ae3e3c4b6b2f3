# SPDX-License-Identifier: Apache-2.0
"""
Our own format's lines as they stand (docs/trace-format.rst), one struct for each event.

Msgspec checks them while it decodes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["AnyLine", "OwnLine"]

_Number = Annotated[int, msgspec.Meta(ge=0)]
_Time = Annotated[int, msgspec.Meta(ge=0)]
_Side = Literal["shared", "private"]
#: A guest may ask for anything; a number beyond 64 bits is a string in hex.
_Asked = int | str


class OwnLine(msgspec.Struct, tag_field="event", gc=False):
    """The fields of every line."""

    t: _Time


class StartBlock(msgspec.Struct):
    name: str
    gpa: _Number
    size: _Number
    confidential: bool = False


class Start(OwnLine, tag="start"):
    version: int
    blocks: list[StartBlock] = []
    targets: dict[str, str] = {}
    unmap: str | None = None


class OwnAttributes(OwnLine, tag="attributes"):
    gpa: _Number
    size: _Number
    private: bool


class OwnMap(OwnLine, tag="map"):
    target: str
    iova: _Number
    size: _Number
    writable: bool = True


class OwnUnmap(OwnLine, tag="unmap"):
    target: str
    iova: _Number
    size: _Number
    unmapped: _Number


class OwnFault(OwnLine, tag="fault"):
    target: str
    iova: _Number
    size: _Number
    write: bool


class OwnFree(OwnLine, tag="free"):
    side: _Side
    gpa: _Number
    size: _Number


class OwnStateChange(OwnLine, tag="state_change"):
    block: str
    offset: _Number
    size: _Number
    before: str
    after: _Side


class OwnConversion(OwnLine, tag="conversion"):
    gpa: _Asked
    size: _Asked
    to: _Side
    result: str = "done"
    took: _Number = 0


class OwnReset(OwnLine, tag="reset"):
    result: str = "done"
    took: _Number = 0


class OwnConnect(OwnLine, tag="connect"):
    target: str


class OwnDisconnect(OwnLine, tag="disconnect"):
    target: str
    reason: str = ""


class OwnDetach(OwnLine, tag="detach"):
    target: str


class OwnViolation(OwnLine, tag="violation"):
    target: str
    rule: str
    iova: _Number | None = None
    size: _Number | None = None
    reason: str = ""


class OwnStale(OwnLine, tag="stale"):
    target: str
    iova: _Number
    size: _Number
    unmap_iova: _Number = 0
    unmap_size: _Number = 0


class OwnPlugged(OwnLine, tag="plugged"):
    device: str


class OwnSummary(OwnLine, tag="summary"):
    pass


AnyLine = (
    Start
    | OwnAttributes
    | OwnMap
    | OwnUnmap
    | OwnFault
    | OwnFree
    | OwnStateChange
    | OwnConversion
    | OwnReset
    | OwnConnect
    | OwnDisconnect
    | OwnDetach
    | OwnViolation
    | OwnStale
    | OwnPlugged
    | OwnSummary
)
