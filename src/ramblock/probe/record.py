# SPDX-License-Identifier: Apache-2.0
"""The record of a probe: counts, violations, stale windows; and the events of its trace."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum
from threading import Lock
from time import monotonic_ns
from typing import NamedTuple

from ramblock.errors import describe_range
from ramblock.probe.windows import Rule, Window
from ramblock.trace import TRACE_VERSION, TraceWriter
from ramblock.units import PAGE_SIZE

__all__ = ["Record", "StaleWindow", "Violation"]

# Enough to look at; a client that goes astray for ever must not fill memory. All are counted, and
# all are in the trace.
_KEPT = 1000


class Violation(NamedTuple):
    """A rule that was broken."""

    client: str
    rule: Rule
    address: int | None
    size: int | None
    errno: int | None
    """The answer to the client; None: nothing."""
    text: str

    def __str__(self) -> str:
        where = (
            ""
            if self.address is None or self.size is None
            else f" {describe_range(self.address, self.size)}"
        )
        return f"{self.client}:{where} {self.rule.value}: {self.text}"


@dataclass(eq=False)
class StaleWindow:
    """A window that the client wanted gone, and that stayed."""

    client: str
    address: int
    size: int
    unmap: tuple[int, int]
    """The unmap that was refused, as (address, size)."""
    since_ns: int
    until_ns: int | None = None
    """When it went after all; None: it was there to the end."""


class Record:
    """
    Notes everything. One thread notes, but for violations, which any may; others may read.

    :param traces: Where events go, each of them to all.
    """

    def __init__(self, *traces: TraceWriter) -> None:
        self._traces = [trace for trace in traces if trace.active]
        self.clients = 0
        #: Counts of events: ``map``, ``unmap``, ``touch``, ``scribble``, ``dma``, ``fault``.
        self.counts: Counter[str] = Counter()
        self.broken: Counter[Rule] = Counter()
        #: How often something was taken that others may not take (``Oddity``, ``Note``), and the
        #: first time in words.
        self.noted: Counter[Enum] = Counter()
        self.first_noted: dict[Enum, str] = {}
        #: The first thousand.
        self.violations: list[Violation] = []
        self.stale_count = 0
        #: The latest thousand.
        self.stale: deque[StaleWindow] = deque(maxlen=_KEPT)
        self.peak_windows = 0
        self.peak_bytes = 0
        self.bytes_mapped = 0
        self._lock = Lock()
        self._stale_now: dict[Window, StaleWindow] = {}

    @property
    def violation_count(self) -> int:
        """How many rules were broken, in all."""
        return self.broken.total()

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.violation_count and not self.stale_count

    def emit(self, event: str, **fields: object) -> None:
        """Write an event."""
        for trace in self._traces:
            trace.emit(event, **fields)

    def start(self, path: str, unmap: str) -> None:
        """
        Note the start.

        A probe knows no blocks and no page states: only the windows of its client.
        """
        self.emit(
            "start",
            version=TRACE_VERSION,
            clock="CLOCK_MONOTONIC",
            page_size=PAGE_SIZE,
            blocks=[],
            guest="unknown",
            enforced_by="unknown",
            targets={},
            socket=path,
            unmap=unmap,
        )

    def connected(self) -> str:
        """Note a client; give it a name."""
        self.clients += 1
        return f"client{self.clients}"

    def mapped(self, client: str, window: Window, count: int) -> None:
        """Note a map; *count* windows are there now."""
        self.counts["map"] += 1
        self.bytes_mapped += window.size
        self.peak_windows = max(self.peak_windows, count)
        self.peak_bytes = max(self.peak_bytes, self.bytes_mapped)
        file = {} if window.file is None else {"file": window.file.name, "offset": window.offset}
        self.emit(
            "map",
            target=client,
            iova=window.address,
            size=window.size,
            writable=window.writable,
            **file,
        )

    def unmapped(self, client: str, address: int, size: int, windows: list[Window]) -> None:
        """Note an unmap."""
        self.counts["unmap"] += 1
        removed = sum(window.size for window in windows)
        self.emit("unmap", target=client, iova=address, size=size, unmapped=removed)
        self._gone(windows)

    def disconnected(self, client: str, reason: str, windows: list[Window]) -> None:
        """Note that a client has left; *windows* were still there, and are gone with it."""
        self.emit(
            "disconnect",
            target=client,
            reason=reason,
            windows=len(windows),
            bytes=sum(window.size for window in windows),
        )
        # A stale window was stale to the end: it does not help that the client left.
        for window in windows:
            self._stale_now.pop(window, None)
        self.bytes_mapped = 0

    def _gone(self, windows: list[Window]) -> None:
        now = monotonic_ns()
        for window in windows:
            self.bytes_mapped -= window.size
            stale = self._stale_now.pop(window, None)
            if stale is not None:
                stale.until_ns = now

    def violation(self, violation: Violation) -> None:
        """Note a broken rule."""
        with self._lock:
            self.broken[violation.rule] += 1
            if len(self.violations) < _KEPT:
                self.violations.append(violation)
        self.emit(
            "violation",
            target=violation.client,
            rule=violation.rule.name.lower(),
            iova=violation.address,
            size=violation.size,
            errno=violation.errno,
            reason=violation.text,
        )

    def became_stale(self, client: str, window: Window) -> None:
        """Note a window that should have gone."""
        if window in self._stale_now or window.refused_unmap is None:
            return
        stale = StaleWindow(
            client, window.address, window.size, window.refused_unmap, monotonic_ns()
        )
        self._stale_now[window] = stale
        self.stale.append(stale)
        self.stale_count += 1
        address, size = window.refused_unmap
        self.emit(
            "stale",
            target=client,
            iova=window.address,
            size=window.size,
            unmap_iova=address,
            unmap_size=size,
        )

    def note(self, client: str, kind: Enum, text: str) -> None:
        """Note something that is taken, although others may not take it: ``Oddity``, ``Note``."""
        self.noted[kind] += 1
        self.first_noted.setdefault(kind, f"{client}: {text}")

    def fault(self, client: str, address: int, size: int, *, write: bool) -> None:
        """Note an access of the device that reached nothing."""
        self.counts["fault"] += 1
        self.emit("fault", target=client, iova=address, size=size, write=write)
