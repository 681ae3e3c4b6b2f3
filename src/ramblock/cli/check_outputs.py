# SPDX-License-Identifier: Apache-2.0
"""Files that ``ramblock check`` writes: a page with pictures, a trace for Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ramblock.errors import UsageError
from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import Finding
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult

__all__ = ["Outputs", "report_summary"]


class Outputs:
    """
    The files to write, and the observers that write them.

    :raises UsageError: A file cannot be written, or a package that it needs is not installed;
        before anything is audited.
    """

    def __init__(self, report: Path | None, perfetto: Path | None, title: str) -> None:
        self._report = report
        self._title = title
        self._stack = ExitStack()
        observers: list[AuditObserver] = []
        if report is not None:
            from ramblock.report.html import require_plotly
            from ramblock.report.timeline import Timeline

            require_plotly()
            self._timeline = Timeline()
            observers.append(self._timeline)
        if perfetto is not None:
            from ramblock.report.perfetto import PerfettoWriter

            try:
                stream = self._stack.enter_context(perfetto.open("wb"))
            except OSError as error:
                raise UsageError(
                    f"--perfetto {perfetto}: {error.strerror}", value=str(perfetto)
                ) from error
            writer = PerfettoWriter(stream)
            self._stack.callback(writer.close)
            observers.append(writer)
        self.observer: AuditObserver | None
        self.observer = (
            observers[0] if len(observers) == 1 else _Both(observers) if observers else None
        )

    def finish(self, result: AuditResult, *, strict: bool) -> None:
        """
        Write the report.

        :raises UsageError: It cannot be written.
        """
        if self._report is None:
            return
        from ramblock.report.page import write_report

        try:
            write_report(
                self._report,
                self._timeline,
                result.findings,
                title=self._title,
                summary=report_summary(result, strict=strict),
                limits=result.limits,
                timed=result.began is not None,
            )
        except OSError as error:
            raise UsageError(
                f"--report {self._report}: {error.strerror}", value=str(self._report)
            ) from error

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def report_summary(result: AuditResult, *, strict: bool) -> dict[str, object]:
    """Return the pairs at the head of a report."""
    failures = result.failures(strict=strict)
    summary: dict[str, object] = {
        "verdict": "nothing found"
        if not failures
        else f"{failures:,} failure{'s' * (failures > 1)}",
        "sources": ", ".join(result.sources),
        "events": f"{result.events:,}",
        "conversions": f"{result.conversions:,}",
    }
    if result.began is not None and result.ended is not None:
        summary["covers"] = f"{(result.ended - result.began) / 1e9:.3f} s"
    summary |= {str(kind): f"{count.count:,}" for kind, count in sorted(result.counts.items())}
    if result.error is not None:
        summary["not read to its end"] = result.error
    return summary


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
