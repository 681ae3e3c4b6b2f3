# SPDX-License-Identifier: Apache-2.0
"""
The reader of text, whoever wrote it: QEMU, the kernel, our bpftrace script, and their loggers.

They are one reader because they come in one file: QEMU's ``ftrace`` backend writes into the
kernel's trace, dmesg is mixed in, a console stands before the first event. A line is tried as the
kernel's, as the script's, as QEMU's event (anywhere in it), as a fault, as QEMU's message.

This is the careful way, line by line. The lines that nearly all of a large recording consists of
are read a chunk at a time (:mod:`~ramblock.trace.readers.hot`), to the same events.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from ramblock.trace.events import Access, Event, Remark, Source
from ramblock.trace.messages.catalogue import find_failure
from ramblock.trace.readers.base import LineReader, shorten
from ramblock.trace.readers.bpftrace import read_call
from ramblock.trace.readers.faults import find_fault
from ramblock.trace.readers.heads import Head, Heads, unescaped, without_colours
from ramblock.trace.readers.kernel import (
    FAULTS,
    KernelEvents,
    KernelLine,
    Task,
    find_line,
    find_task,
)
from ramblock.trace.readers.qemu_meaning import QemuMeaning, UnreadableError
from ramblock.trace.readers.qemu_messages import Failures
from ramblock.trace.readers.qemu_table import EVENTS, IGNORED, Reading, Value, forms_of

__all__ = ["TextReader", "find_event"]

_BOM = b"\xef\xbb\xbf"
_NAMES = frozenset(name.encode() for name in (*EVENTS, *IGNORED))
# A word at whose beginning stands that of a name, and a blank behind it: QEMU's log backend always
# writes one. The look behind comes after a first letter, so that a search skips to such letters.
_WORD = re.compile(
    rb"([" + b"".join(sorted({name[:1] for name in _NAMES})) + rb"](?<![\w./-].)(?:"
    + b"|".join(sorted({name[1:].partition(b"_")[0] for name in _NAMES}))
    + rb")_\w{1,64})(?=[ \t\r\n\"\\]|\Z)"
)  # fmt: skip
# Before it where the name is not an event, but asked for: `-trace NAME`, `enable=NAME`, a list.
_ASKED = re.compile(rb"(?:-trace|-d|trace:|enable=|events=|[,'=])[ \t]{0,4}\Z")
_PRINTED = re.compile(rb" {1,20}(\d{1,18})\.(\d{3}) pid=(\d{1,10})")
_LOST = re.compile(
    rb"\s{0,20}CPU:\s{0,20}\d{1,5} \[LOST (?:\d{1,20} )?EVENTS\]|(?:^|\W)LOST \d{1,20} events?\b"
    rb"|Lost \d{1,20} events"
)
_CHATTER = re.compile(
    rb"\s*\Z|\s{0,20}#|[^\n]{0,40}DMAR: DRHD: handling fault status"
    rb"|cpus=\d{1,5}\s{0,20}\Z|##### CPU|Attach(?:ed|ing) \d{1,9} probes?"
    rb"|\s{1,20}[0-9a-f]{4,16} [^\n]{1,400}\)\Z|version = \d{1,3}\s{0,20}\Z"
)
_TASKS_KEPT = 4096
#: Lines behind which a second logger's copy is not looked for.
_COPIES_KEPT = 1024


class TextReader(LineReader):
    """The careful reader of text."""

    def __init__(self, source: Source, *, virtio_mem_block_size: int | None = None) -> None:
        super().__init__(source, virtio_mem_block_size=virtio_mem_block_size)
        self._kernel = KernelEvents(source, self.needs)
        self.heads = Heads()
        self.tasks: dict[bytes, Task] = {}
        self._qemu: dict[str | None, tuple[QemuMeaning, Failures]] = {}
        #: Guests with a failure that is not told to its end.
        self.telling: dict[str | None, Failures] = {}
        self._copies: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._printed_time = 0

    def _end(self, found: list[Event]) -> None:
        super()._end(found)
        self.flush(found)

    def _line(self, raw: bytes, number: int, found: list[Event]) -> None:
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if raw.endswith(b"\r"):
            raw = raw[:-1]
        raw = without_colours(raw)
        known = False
        kernel = find_line(raw)
        if kernel is not None and not kernel.marker:
            known = self._kernel_line(kernel, raw, number, found)
        else:
            known = self._call(raw, number, found) or self._qemu_line(raw, kernel, number, found)
            if not known:
                known = self._fault(raw, number, found) or self._message(raw, number, found)
        if known:
            return
        if (b"LOST" in raw or b"Lost" in raw) and _LOST.search(raw) is not None:
            self._append(
                Remark(None, self.source, number, "lost", shorten(raw).strip(), lost=True), found
            )
        elif _CHATTER.match(raw) is None:
            self.counts.note_unknown(number, raw)

    def block_with_care(self, block: bytes, found: list[Event]) -> None:
        """Read whole lines, one after the other."""
        super()._block(block, found)

    def leave(self, number: int, times: dict[str, int]) -> None:
        """Count lines and events that the fast way has read."""
        self.counts.lines = number
        for name, count in times.items():
            if count:
                self.counts.note(name, count)

    def _append(self, event: Event, found: list[Event]) -> None:
        if self.telling:
            self.flush(found)
        found.append(event)

    def flush(self, found: list[Event]) -> None:
        """Append what is kept of failures, since something else happened."""
        for failures in self.telling.values():
            failures.flush(found)
        self.telling.clear()

    def _kernel_line(self, line: KernelLine, raw: bytes, number: int, found: list[Event]) -> bool:
        name = line.name.decode()
        task = self.tasks.get(line.head) or self.task_of(line.head)
        try:
            event = self._kernel.translate(line, number, task)
        except UnreadableError:
            self.counts.note_unreadable(number, raw)
            return True
        self.counts.note(name)
        if event is not None:
            self._append(event, found)
        return True

    def task_of(self, head: bytes) -> Task:
        """Return who was running, by what stands before the time."""
        thread, process = find_task(head)
        target = "iommu" if process is None else f"iommu of process {process}"
        task = Task(thread, target, self.guest(process), process is not None)
        if len(self.tasks) >= _TASKS_KEPT:
            self.tasks.clear()
        self.tasks[head] = task
        return task

    def _call(self, raw: bytes, number: int, found: list[Event]) -> bool:
        call = read_call(raw, number, self.guest)
        if call is None:
            return False
        name, event = call
        self.counts.note(f"type1 {name}")
        if event is None:
            self.counts.note_unreadable(number, raw)
        else:
            self._append(event, found)
        return True

    def _qemu_line(
        self, raw: bytes, kernel: KernelLine | None, number: int, found: list[Event]
    ) -> bool:
        """Read all events of QEMU in a line: two threads may have written it."""
        first = find_event(raw)
        if first is None:
            return False
        if b"\\" in raw:  # JSON in JSON
            raw = unescaped(raw)
            first = find_event(raw)
        return first is not None and self.qemu_events(raw, first, kernel, None, number, found)

    def qemu_events(
        self,
        raw: bytes,
        first: re.Match[bytes],
        kernel: KernelLine | None,
        head: Head | None,
        number: int,
        found: list[Event],
    ) -> bool:
        """
        Read the events of QEMU in a line, from the first on; whether there is one.

        :param head: None: it is still to be read, if an event asks for it.
        """
        known = False
        match: re.Match[bytes] | None = first
        while match is not None:
            name = match[1].decode()
            if name in IGNORED:
                self.counts.note(name)
                known, end = True, match.end()
            else:
                if head is None:
                    head = self._head(raw, first, kernel)
                end = self._qemu_event(raw, match, head, number, found)
                known = known or end > match.end() or self._is_unreadable(raw, match, number)
                end = end or match.end()
            match = find_event(raw, end)
        return known

    def _head(self, raw: bytes, match: re.Match[bytes], kernel: KernelLine | None) -> Head:
        if kernel is not None:
            thread, process = find_task(kernel.head)
            return Head(kernel.time, process, thread, b"", fine=True)
        return self.heads.read(raw[: match.start()], raw[match.end() :])

    def _qemu_event(
        self, raw: bytes, match: re.Match[bytes], head: Head, number: int, found: list[Event]
    ) -> int:
        """Read one event; return where it ends in the line, or 0."""
        name = match[1].decode()
        start = match.end()
        while raw[start : start + 1] in (b" ", b"\t"):
            start += 1
        for form in forms_of(name):
            read = form.from_text(raw, start)
            if read is not None:
                values, end = read
                end = max(end, match.end() + 1)
                break
        else:
            printed = self._printed(raw, match)
            if printed is None:
                return 0
            form, values, head = printed
            end = len(raw)
        if self._is_copy(head, raw[match.start() : end]):
            return end
        source = self.guest(head.process)
        at = head.time, source, number, head.thread
        meaning, _ = self.qemu_of(source)
        events: list[Event] = []
        try:
            meaning.translate(name, form, values, at, events)
        except UnreadableError:
            return 0
        self.counts.note(name)
        for event in events:
            self._append(event, found)
        return end

    def _printed(
        self, raw: bytes, match: re.Match[bytes]
    ) -> tuple[Reading, tuple[Value, ...], Head] | None:
        """Read a line of QEMU's simpletrace.py: microseconds since the last, process, fields."""
        told = _PRINTED.match(raw, match.end())
        if told is None or match.start():
            return None
        for form in forms_of(match[1].decode()):
            values = form.from_printed(raw[told.end() :])
            if values is not None:
                self._printed_time += int(told[1]) * 1000 + int(told[2])
                head = Head(self._printed_time, told[3].decode(), None, b"", fine=True)
                return form, values, head
        return None

    def _is_unreadable(self, raw: bytes, match: re.Match[bytes], number: int) -> bool:
        """Whether a name is an event's, whose text cannot be read: it is counted."""
        before = raw[max(match.start() - 16, 0) : match.start()]
        if _ASKED.search(before) is not None:
            return False
        self.counts.note_unreadable(number, raw)
        return True

    def _is_copy(self, head: Head, text: bytes) -> bool:
        """Whether another logger wrote the same before: the same moment, guest and words."""
        if head.time is None or not head.logger or not (head.fine or head.process):
            return False
        key = (head.time, head.process, text)
        logger = self._copies.setdefault(key, head.logger)
        if logger != head.logger:
            self.counts.duplicates += 1
            self.needs["duplicates"] = (
                f"{self.counts.duplicates:,} lines are another logger's copies of lines before, and"
                " count once"
            )
            return True
        if len(self._copies) > _COPIES_KEPT:
            self._copies.popitem(last=False)
        return False

    def qemu_of(self, source: Source) -> tuple[QemuMeaning, Failures]:
        """Return what is known of a guest."""
        guest = self._qemu.get(source.guest)
        if guest is None:
            guest = QemuMeaning(self.virtio_mem_block_size, self.needs), Failures()
            self._qemu[source.guest] = guest
        return guest

    def _fault(self, raw: bytes, number: int, found: list[Event]) -> bool:
        fault = find_fault(raw)
        if fault is None:
            return False
        time = self.heads.read(raw[: fault.start], b"").time
        self.counts.note("fault")
        self._append(
            Access(
                time,
                self.source,
                number,
                FAULTS,
                fault.address,
                None,
                fault.write,
                refused=True,
                device=fault.device,
            ),
            found,
        )
        return True

    def _message(self, raw: bytes, number: int, found: list[Event]) -> bool:
        told = find_failure(raw)
        if told is None:
            return False
        message, match = told
        if not message.evidence:
            words = match[0].decode(errors="backslashreplace")
            self.needs[words] = f"QEMU says at line {number}: {words}: {message.failed}"
            return True
        head = self.heads.read(raw[: match.start()], raw[match.end() :])
        if self._is_copy(head, match[0]):
            return True
        source = self.guest(head.process)
        meaning, failures = self.qemu_of(source)
        for guest, others in list(self.telling.items()):
            if guest != source.guest:
                others.flush(found)
                del self.telling[guest]
        failures.tell(message, match, raw, (head.time, source, number, None), meaning, found)
        self.telling[source.guest] = failures
        self.counts.note("message")
        return True


def find_event(raw: bytes, position: int = 0) -> re.Match[bytes] | None:
    """Find the next name of an event of QEMU; it is group 1."""
    match = _WORD.search(raw, position)
    while match is not None and match[1] not in _NAMES:
        match = _WORD.search(raw, match.end())
    return match
