# SPDX-License-Identifier: Apache-2.0
"""Reads the kernel's events as text: tracefs, ``trace-cmd report``, ``perf script``."""

from __future__ import annotations

import re

from ramblock.trace.events import Event, Remark, Source
from ramblock.trace.kernel_events import IGNORED, KernelEvents, NotUnderstoodError, Task
from ramblock.trace.reader import LineReader

__all__ = ["FtraceReader"]

# [cpu], perhaps flags (d..1. or so), time, perhaps the subsystem (perf), event, arguments. The task
# stands before it.
_LINE = re.compile(
    rb"\s\[(?:\d+)\]\s+(?:[^\s\d]\S*\s+|\d+[^\s\d.]\S*\s+)?"
    rb"(\d{1,12})\.(\d{6}|\d{9}):\s+(?:\w+:)?(\w+):\s*(.*)",
    re.DOTALL,
)
# `comm-tid`, perhaps with `( tgid)`: ftrace. `comm tid` or `comm pid/tid`: perf.
_FTRACE_TASK = re.compile(rb"\s*(.+)-(\d+)(?:\s+\(\s*(\d+|-+)\))?\s*", re.DOTALL)
_PERF_TASK = re.compile(rb"\s*(.+?)\s+(?:(-?\d+)/)?(-?\d+)\s*", re.DOTALL)
_LOST = re.compile(rb"\s*CPU:\s*(\d+) \[LOST (\d+ )?EVENTS\]\s*|.*\bLOST (\d+) events?\b.*")
_COMMENT = re.compile(rb"\s*#|cpus=\d+\s*\Z|\s*\Z")

_TASKS_KEPT = 4096
_NAMES = {name.encode() for name in IGNORED}


class FtraceReader(LineReader):
    """
    A parser of the kernel's events as text.

    Lines of other events are counted, since many are recorded beside these.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._events = KernelEvents(source)
        self._tasks: dict[bytes, Task] = {}

    @property
    def needs(self) -> dict[str, str]:
        """Further sources that would tell more, by a keyword."""
        return self._events.needs

    def _parse(self, lines: list[bytes]) -> list[Event]:
        found: list[Event] = []
        search = _LINE.search
        makers = self._events.makers
        tasks = self._tasks
        names: dict[bytes, int] = {}
        number = self.counts.lines
        for raw in lines:
            number += 1
            match = search(raw)
            if match is None:
                self._other(raw, number, found)
                continue
            second, fraction, name, text = match.groups()
            make = makers.get(name)
            event = None
            if make is not None:
                head = raw[: match.start()]
                task = tasks.get(head) or self._task(head)
                scale = 1000 if len(fraction) == 6 else 1
                time = int(second) * 1_000_000_000 + int(fraction) * scale
                try:
                    event = make(time, number, task, text)
                except NotUnderstoodError:
                    self.counts.note_unknown(number, raw)
                    continue
            if event is not None:
                found.append(event)
            elif make is None and name not in _NAMES:
                self.counts.note_unknown(number, raw)
                continue
            names[name] = names.get(name, 0) + 1
        self.counts.lines = number
        self.counts.events += len(found)
        by_name = self.counts.by_name
        for key, times in names.items():
            by_name[key.decode()] = by_name.get(key.decode(), 0) + times
        return found

    def _task(self, head: bytes) -> Task:
        match = _FTRACE_TASK.fullmatch(head)
        if match is not None:
            comm, thread, process = match.groups()
            if process is not None and process.startswith(b"-"):
                process = None  # not recorded for this task
        else:
            match = _PERF_TASK.fullmatch(head)
            comm, process, thread = match.groups() if match is not None else (head, None, b"?")
        name = thread.decode()
        target = "iommu" if process is None else f"iommu of process {process.decode()}"
        task = Task(f"{comm.strip().decode(errors='replace')}-{name}", target, process is not None)
        if len(self._tasks) >= _TASKS_KEPT:
            self._tasks.clear()
        self._tasks[head] = task
        return task

    def _other(self, raw: bytes, number: int, found: list[Event]) -> None:
        lost = _LOST.fullmatch(raw)
        if lost is not None:
            text = raw.decode(errors="replace").strip()
            found.append(Remark(None, self.source, number, "lost", text, lost=True))
        elif _COMMENT.match(raw) is None and not raw.startswith(b"##### CPU"):
            self.counts.note_unknown(number, raw)
