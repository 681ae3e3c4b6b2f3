# SPDX-License-Identifier: Apache-2.0
"""Files that ``ramblock check`` writes: a page with pictures, a trace for Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

from ramblock.check.groups import group_faults, group_notes
from ramblock.check.verdict import Judgement, failing_kinds
from ramblock.cli.outputs import OutputFile, open_page
from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import Finding
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult
from ramblock.units import format_size

__all__ = ["Outputs", "report_summary"]


class Outputs:
    """
    The files to write, and the observers that write them.

    :raises UsageError: A file cannot be written, or a package that it needs is not installed;
        before anything is audited.
    """

    def __init__(self, report: Path | None, perfetto: Path | None, title: str) -> None:
        self._title = title
        self._report: IO[bytes] | None = None
        observers: list[AuditObserver] = []
        with ExitStack() as stack:
            if report is not None:
                from ramblock.report.timeline import Timeline

                self._report = stack.enter_context(open_page("--report", report))
                self._timeline = Timeline()
                observers.append(self._timeline)
            if perfetto is not None:
                from ramblock.report.perfetto import PerfettoWriter

                writer = PerfettoWriter(stack.enter_context(OutputFile("--perfetto", perfetto)))
                stack.push(_if_well(writer.close))
                observers.append(writer)
            self._stack = stack.pop_all()
        self.observer: AuditObserver | None
        self.observer = (
            observers[0] if len(observers) == 1 else _Both(observers) if observers else None
        )

    def finish(self, result: AuditResult, judgement: Judgement, *, strict: bool = False) -> None:
        """
        Write the report.

        :raises OSError: It cannot be written.
        """
        if self._report is None:
            return
        from ramblock.report.page import write_report

        write_report(
            self._report,
            self._timeline,
            result,
            title=self._title,
            summary=report_summary(result, judgement),
            sentence=judgement.sentence,
            failing=failing_kinds(strict=strict),
            faults=[group.findings for group in group_faults(result.findings)],
            notes=[group.findings for group in group_notes(result.findings)],
        )

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def _if_well(close: Callable[[], None]) -> Callable[..., None]:
    def leave(kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            close()

    return leave


def report_summary(result: AuditResult, judgement: Judgement) -> list[tuple[str, str]]:
    """Return the pairs at the head of a report."""
    summary = [("verdict", judgement.verdict.value)]
    if judgement.failures:
        summary.append(("failures", f"{judgement.failures:,}"))
    if result.error is not None:
        summary.append(("not read to its end", result.error))
    summary += [("why", reason) for reason in result.cannot_tell]
    summary += [
        ("sources", ", ".join(result.sources)),
        ("events", f"{result.events:,}"),
        ("conversions", f"{result.conversions:,}"),
        ("judged", format_size(result.judged_bytes)),
    ]
    if result.began is not None and result.ended is not None:
        summary.append(("covers", f"{(result.ended - result.began) / 1e9:.3f} s"))
    counts = sorted(result.counts.items())
    return summary + [(str(kind), f"{count.count:,}") for kind, count in counts]


class _Both:
    """Several observers of one audit."""

    def __init__(self, observers: Sequence[AuditObserver]) -> None:
        self._observers = observers

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        for each in self._observers:
            each.page_state(time, start, end, private=private)

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        for each in self._observers:
            each.mapped(time, target, start, end)

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        for each in self._observers:
            each.unmapped(time, target, start, end)

    def converted(self, event: ConversionEnd) -> None:
        for each in self._observers:
            each.converted(event)

    def accessed(self, event: Access) -> None:
        for each in self._observers:
            each.accessed(event)

    def found(self, finding: Finding) -> None:
        for each in self._observers:
            each.found(finding)
