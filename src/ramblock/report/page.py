# SPDX-License-Identifier: Apache-2.0
"""The page of an audit: memory over time, counts and rates, findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import IO

from ramblock.errors import describe_range
from ramblock.report.html import write_page
from ramblock.report.picture import Shade
from ramblock.report.timeline import Rate, Timeline
from ramblock.trace.events import Origin
from ramblock.trace.findings import MEANINGS, Finding, FindingKind
from ramblock.trace.result import AuditResult
from ramblock.units import format_size

__all__ = ["write_report"]

#: Empty addresses between two parts of memory that are drawn as they are; wider ones are cut out of
#: the picture.
_MOST_EMPTY = 16 << 20


def write_report(
    stream: IO[bytes],
    timeline: Timeline,
    result: AuditResult,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    sentence: str,
    failing: Set[FindingKind],
    faults: Sequence[Sequence[Finding]],
    notes: Sequence[Sequence[Finding]],
) -> None:
    """
    Write the page. Without times in the trace, the order of its events stands for them.

    :param summary: The entries of its head, as pairs.
    :param sentence: The verdict.
    :param failing: Kinds that are failures; the others are listed apart.
    :param faults: In groups, each of them a row.
    :param notes: Likewise.
    :raises UsageError: Plotly is not installed.
    :raises OSError: It cannot be written.
    """
    timed = result.began is not None
    began = timeline.began if result.began is None else result.began
    ended = timeline.ended if result.ended is None else max(result.ended, timeline.ended)
    findings = [each for each in result.findings if each.kind in failing]
    rectangles = timeline.columns()
    for column, more in zip(rectangles, _stale_windows(findings, ended), strict=True):
        column += more
    origin = _origin_text({each.opened.name for each in result.findings})
    sentences = list(result.limits)
    if timeline.left_out:
        sentences.append(
            f"the picture leaves out {timeline.left_out:,} parts that lasted at most"
            f" {timeline.left_out_below / 1e9:g} s:"
            " there are too many to draw (the findings are complete)"
        )
    data = {
        "title": title,
        "summary": summary,
        "sentence": sentence,
        "limits": sentences,
        "timed": timed,
        "began": began,
        "ended": ended,
        "segments": [
            [start, end, f"{start:#x}", format_size(end - start)]
            for start, end in find_segments(zip(*rectangles[2:4], strict=True), findings)
        ],
        # By columns: shorter as JSON, and faster to go through.
        "rectangles": rectangles,
        "counts": list(zip(*timeline.counts(), strict=True)),
        "rates": {
            "conversions": _rate(timeline.conversions),
            "page state changes": _rate(timeline.changes),
            "refused accesses": _rate(timeline.faults),
        },
        "findings": [_finding(each, origin) for each in findings],
        "faults": [_group(group, origin) for group in faults],
        "notes": [_group(group, origin) for group in notes if group[0].kind not in failing],
        "meanings": {str(kind): text for kind, text in MEANINGS.items()},
        "failures": sorted(str(kind) for kind in failing),
    }
    write_page(
        stream,
        title=f"ramblock: {title}",
        data=data,
        body="page.html",
        script="page.js",
        style="page.css",
    )


def _group(
    group: Sequence[Finding], origin: Callable[[Origin | None], str | None]
) -> dict[str, object]:
    first, last = group[0], group[-1]
    start, end = min(each.start for each in group), max(each.end for each in group)
    return {
        **_finding(first, origin),
        "count": sum(each.count for each in group),
        "start": start,
        "end": end,
        "range": describe_range(start, end - start),
        "last": origin(last.opened),
    }


def find_segments(
    drawn: Iterable[tuple[int, int]], findings: Sequence[Finding]
) -> list[tuple[int, int]]:
    """Find the guest's addresses with something to show: holes would fill most of the picture."""
    ranges = sorted(
        # Few of them are different.
        set(drawn) | {(each.start, each.end) for each in findings if each.end > each.start}
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


def _stale_windows(findings: Sequence[Finding], ended: int) -> Iterator[list[int]]:
    """Draw ranges that stayed mapped after an unmap or unplug: their state may be unknown."""
    stale = [
        each
        for each in findings
        if each.kind in (FindingKind.STALE, FindingKind.UNPLUGGED) and each.since is not None
    ]
    yield [each.since or 0 for each in stale]
    yield [ended if each.until is None else each.until for each in stale]
    yield [each.start for each in stale]
    yield [each.end for each in stale]
    yield [int(Shade.STALE)] * len(stale)


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
        "range": describe_range(finding.start, finding.size),
        "size": format_size(finding.size),
        "since": finding.since,
        "until": finding.until,
        "open": finding.open,
        "opened": origin(finding.opened),
        "closed": origin(finding.closed),
        "mapped": origin(finding.mapped),
        "note": finding.note,
        "device": finding.device,
        "grace": finding.grace,
    }
