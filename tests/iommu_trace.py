"""
The kernel's own account of what is mapped: the tracepoints iommu:map and iommu:unmap.

An event says neither which address space it is of nor which device; the tests use addresses that
nobody else does.
"""

import re
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from ramblock.units import PAGE_SIZE

__all__ = ["IommuTrace", "TraceEvent"]

_TRACEFS = Path("/sys/kernel/tracing")
# include/trace/events/iommu.h. Ends are exclusive. The size of an unmap is what was asked for.
_EVENT = re.compile(
    r"\b(?P<verb>map|unmap): IOMMU: iova=(?P<start>0x[0-9a-f]+) - (?P<end>0x[0-9a-f]+) "
    r"(?:paddr=0x[0-9a-f]+ size=(?P<size>\d+)|size=\d+ unmapped_size=(?P<unmapped>\d+))"
)
_BUFFER_KIB = 8192


class TraceEvent(NamedTuple):
    verb: Literal["map", "unmap"]
    iova: int
    size: int
    """Bytes that were really mapped or unmapped."""

    @property
    def pages(self) -> set[int]:
        """Page numbers."""
        return set(range(self.iova // PAGE_SIZE, (self.iova + self.size) // PAGE_SIZE))


class IommuTrace:
    """
    A buffer of its own in tracefs, with these two events on; also a context manager.

    :param start: Events below this address are somebody else's.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._folder = _TRACEFS / "instances" / "ramblock-test"
        self._folder.mkdir()
        (self._folder / "buffer_size_kb").write_text(f"{_BUFFER_KIB}\n")
        self._switch("1")

    def _switch(self, value: str) -> None:
        for event in ("map", "unmap"):
            (self._folder / "events/iommu" / event / "enable").write_text(value)

    def read(self) -> list[TraceEvent]:
        """Events since the last look, oldest first."""
        lines = (self._folder / "trace").read_text().splitlines()
        (self._folder / "trace").write_text("")
        for stats in self._folder.glob("per_cpu/cpu*/stats"):
            # Otherwise what is compared would be a part of what happened.
            assert "overrun: 0\n" in stats.read_text(), stats.read_text()
        events = []
        for line in lines:
            match = _EVENT.search(line)
            if match is None:
                continue
            iova = int(match["start"], 16)
            if iova >= self._start:
                verb: Literal["map", "unmap"] = "map" if match["verb"] == "map" else "unmap"
                events.append(TraceEvent(verb, iova, int(match["size"] or match["unmapped"])))
        return events

    def __enter__(self) -> "IommuTrace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._switch("0")
        self._folder.rmdir()
