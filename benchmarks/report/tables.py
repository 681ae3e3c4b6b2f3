# SPDX-License-Identifier: Apache-2.0
"""The tables for people: all rows and all promises as text, and a short one in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.machine import Machine
from harness.measure import Summary
from harness.rows import WALL, Row
from report.promises import Promise
from report.results import Results
from report.short import short_rows

__all__ = ["format_value", "markdown", "text"]

# Reading the clock varies by some ten nanoseconds for each request of a group: what is less is only
# known to be small.
_RESOLUTION = 20


_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))


def format_value(value: float, unit: str) -> str:
    """Write a time with three digits and its unit, or a rate."""
    if unit != "ns":
        return f"{value:,.0f} {unit}"
    if value < _RESOLUTION:
        return f"<{_RESOLUTION} ns"
    factor, name = next(entry for entry in _UNITS if value >= entry[0])
    return f"{_digits(value / factor, whole=factor == 1)} {name}"


def _digits(value: float, *, whole: bool) -> str:
    return f"{value:.{0 if whole or value >= 100 else 1 if value >= 10 else 2}f}"


def _format_summary(summary: Summary | None, unit: str) -> str:
    """Write the best decile, then the median and the worst decile in the same unit."""
    if summary is None:
        return ""
    best = format_value(summary.best, unit)
    if unit != "ns":
        return f"{best} ({summary.median:,.0f}-{summary.worst:,.0f})"
    if summary.best < _RESOLUTION:
        return best
    factor, _ = next(entry for entry in _UNITS if summary.best >= entry[0])
    median, worst = (
        _digits(value / factor, whole=factor == 1) for value in (summary.median, summary.worst)
    )
    return f"{best} ({median}-{worst})"


def _format_fact(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_ratio(row: Row, contender: str) -> str:
    ours = next(iter(row.results.values())).best
    theirs = row.results.get(contender)
    if theirs is None or not ours:
        return ""
    ratio = theirs.best / ours
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.3g}" if ratio >= 0.01 else "<0.01"


def _is_slower(row: Row) -> bool:
    """Whether some other contender needed less than the first."""
    first, *others = row.results.values()
    return any(other.best < first.best for other in others)


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    for line in (head, ["-" * width for width in widths], *body):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _union(rows: Sequence[Row], attribute: str) -> list[str]:
    """Names of all columns that some row has."""
    return list(dict.fromkeys(name for row in rows for name in getattr(row, attribute)))


def _case(title: str, rows: Sequence[Row]) -> Iterator[str]:
    parameters = _union(rows, "parameters")
    contenders = _union(rows, "results")
    facts = _union(rows, "facts")
    notes = list(dict.fromkeys(row.note for row in rows if row.note and _is_slower(row)))
    others = contenders[1:]
    head = [
        *parameters,
        *contenders,
        *(f"{name} / {contenders[0]}" for name in others),
        *facts,
        "gauge",
    ]
    body = [
        [
            *(row.parameters.get(name, "") for name in parameters),
            *(_format_summary(row.results.get(name), row.unit) for name in contenders),
            *(_format_ratio(row, name) for name in others),
            *(_format_fact(row.facts[name]) if name in row.facts else "" for name in facts),
            _format_summary(row.gauge, "ns"),
        ]
        for row in rows
    ]
    if notes:
        head.append("")
        for line, row in zip(body, rows, strict=True):
            line.append(
                f"[{notes.index(row.note) + 1}]" if row.note in notes and _is_slower(row) else ""
            )
    # The clock of a table is that of its rows.
    yield f"{title}, by the clock on the wall" if rows[0].clock == WALL else title
    yield ""
    yield from _grid(head, body)
    for number, note in enumerate(notes, 1):
        yield f"[{number}] {note}"
    yield ""


def text(machine: Machine, results: Results, promises: Sequence[Promise]) -> Iterator[str]:
    """Yield the lines of everything: each table, the promises, the machine."""
    for title, rows in results.cases():
        yield from _case(title, rows)
    yield "best decile (median-worst decile) of CPU time, unless the title says otherwise"
    yield "A / B: how many times the best decile of B is in that of A"
    yield "gauge: a fixed loop in Python, in the same rounds; if it differs, so did the machine"
    yield ""
    if promises:
        body = [[entry.what, entry.promised, entry.measured, entry.verdict] for entry in promises]
        yield from _grid(["what", "promised", "measured", "holds"], body)
        yield ""
    yield from machine.lines()


def markdown(machine: Machine, results: Results, promises: Sequence[Promise]) -> Iterator[str]:
    """Yield the lines of the short table, for a README."""
    yield f"Measured on {machine.date} with {machine.one_line()}"
    yield ""
    rows = list(short_rows(results))
    contenders = list(dict.fromkeys(name for row in rows for name in row.values))
    yield "| | " + " | ".join(contenders) + " |"
    yield "|---|" + "--:|" * len(contenders)
    for row in rows:
        cells = (
            "-" if (value := row.values.get(name)) is None else format_value(value, "ns")
            for name in contenders
        )
        yield f"| {row.what} | " + " | ".join(cells) + " |"
    yield ""
    if not promises:
        return
    yield "| promised | measured | holds |"
    yield "|---|---|---|"
    for entry in promises:
        yield f"| {entry.what}: {entry.promised} | {entry.measured} | {entry.verdict} |"
