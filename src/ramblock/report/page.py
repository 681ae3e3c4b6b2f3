# SPDX-License-Identifier: Apache-2.0
"""The page of an audit: memory over time, counts and rates, findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from ramblock.report.html import write_page
from ramblock.report.shades import Shade
from ramblock.report.timeline import Rate, Rectangle, Timeline
from ramblock.trace.events import Origin
from ramblock.trace.findings import FAILURES, MEANINGS, Finding, FindingKind
from ramblock.units import format_size

__all__ = ["write_report"]

#: Empty addresses between two parts of memory that are drawn as they are; wider ones are cut out of
#: the picture.
_MOST_EMPTY = 16 << 20


def write_report(
    path: Path,
    timeline: Timeline,
    findings: Sequence[Finding],
    *,
    title: str,
    summary: Mapping[str, object],
    limits: Sequence[str],
    timed: bool,
) -> None:
    """
    Write the page.

    :param findings: Worst first.
    :param summary: The entries of its head, as pairs.
    :param limits: Gaps of the trace, in sentences.
    :param timed: Whether the trace has times; else the order of its events stands for them.
    :raises UsageError: Plotly is not installed.
    :raises OSError: The file cannot be written.
    """
    rectangles = timeline.rectangles()
    rectangles += _stale_windows(findings, timeline.ended)
    origin = _origin_text({each.opened.name for each in findings})
    sentences = list(limits)
    if timeline.left_out:
        sentences.append(
            f"the picture leaves out {timeline.left_out:,} parts that lasted at most"
            f" {timeline.left_out_below / 1e9:g} s:"
            " there are too many to draw (the findings are complete)"
        )
    data = {
        "title": title,
        "summary": [[key, str(value)] for key, value in summary.items()],
        "limits": sentences,
        "timed": timed,
        "began": timeline.began,
        "ended": timeline.ended,
        "segments": [
            [start, end, f"{start:#x}", format_size(end - start)]
            for start, end in find_segments(rectangles, findings)
        ],
        # By columns: shorter as JSON, and faster to go through.
        "rectangles": [list(column) for column in zip(*rectangles, strict=True)] or [[]] * 5,
        "counts": [list(column) for column in zip(*timeline.counts(), strict=True)],
        "rates": {
            "conversions": _rate(timeline.conversions),
            "page state changes": _rate(timeline.changes),
            "refused accesses": _rate(timeline.faults),
        },
        "findings": [_finding(each, origin) for each in findings],
        "meanings": {str(kind): text for kind, text in MEANINGS.items()},
        "failures": sorted(str(kind) for kind in FAILURES),
    }
    write_page(
        path,
        title=f"ramblock: {title}",
        data=data,
        body="page.html",
        script="page.js",
        style="page.css",
    )


def find_segments(
    rectangles: Sequence[Rectangle], findings: Sequence[Finding]
) -> list[tuple[int, int]]:
    """Find the guest's addresses with something to show: holes would fill most of the picture."""
    ranges = sorted(
        [(each.start, each.end) for each in rectangles]
        + [(each.start, each.end) for each in findings if each.end > each.start]
    )
    segments: list[tuple[int, int]] = []
    for start, end in ranges:
        if segments and start - segments[-1][1] <= _MOST_EMPTY:
            segments[-1] = segments[-1][0], max(segments[-1][1], end)
        else:
            segments.append((start, end))
    return segments


def _rate(rate: Rate) -> dict[str, object]:
    return {"width": rate.width, "buckets": sorted(rate.buckets.items())}


def _stale_windows(findings: Sequence[Finding], ended: int) -> list[Rectangle]:
    """Draw ranges that stayed mapped after an unmap or unplug: their state may be unknown."""
    return [
        Rectangle(
            each.since,
            ended if each.until is None else each.until,
            each.start,
            each.end,
            Shade.STALE,
        )
        for each in findings
        if each.kind in (FindingKind.STALE, FindingKind.UNPLUGGED) and each.since is not None
    ]


def _origin_text(names: Set[str]) -> Callable[[Origin | None], str | None]:
    """With one file its name would fill the table."""

    def text(origin: Origin | None) -> str | None:
        if origin is None:
            return None
        return f"line {origin.line}" if len(names) == 1 else str(origin)

    return text


def _finding(finding: Finding, origin: Callable[[Origin | None], str | None]) -> dict[str, object]:
    return {
        "kind": str(finding.kind),
        "target": finding.target,
        "start": finding.start,
        "end": finding.end,
        "range": f"[{finding.start:#x}, {finding.end:#x})",
        "size": format_size(finding.size),
        "since": finding.since,
        "until": finding.until,
        "open": finding.open,
        "opened": origin(finding.opened),
        "closed": origin(finding.closed),
        "mapped": origin(finding.mapped),
        "note": finding.note,
    }
