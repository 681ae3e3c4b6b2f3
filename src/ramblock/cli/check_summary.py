# SPDX-License-Identifier: Apache-2.0
"""The findings of an audit, for people: worst first, neighbours together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ramblock.errors import describe_range
from ramblock.trace.findings import FAILURES, MEANINGS, Finding, FindingKind
from ramblock.trace.result import AuditResult, rank
from ramblock.units import format_size

__all__ = ["FindingGroup", "group", "print_result", "print_verdict"]

_GROUPS_SHOWN = 20


class FindingGroup(NamedTuple):
    """Findings of one kind and target that lie side by side and ended together."""

    findings: list[Finding]

    @property
    def start(self) -> int:
        """Address where the first begins."""
        return self.findings[0].start

    @property
    def end(self) -> int:
        """Address where the last ends."""
        return self.findings[-1].end

    @property
    def worst(self) -> Finding:
        """The worst of them."""
        return min(self.findings, key=rank)


def group(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Put neighbours together; worst group first."""
    groups: list[FindingGroup] = []
    for finding in sorted(findings, key=_neighbourhood):
        last = groups[-1].findings[-1] if groups else None
        if (
            last is not None
            and last.end == finding.start
            and _neighbourhood(last)[:-1] == _neighbourhood(finding)[:-1]
        ):
            groups[-1].findings.append(finding)
        else:
            groups.append(FindingGroup([finding]))
    return sorted(groups, key=lambda each: rank(each.worst))


def _neighbourhood(finding: Finding) -> tuple[str, str, str, str, int]:
    # A window belongs to the event that closed it; a broken rule has no end, and belongs to nothing
    # but its own event.
    ended = str(finding.closed or ("" if finding.open else finding.opened))
    return finding.kind, finding.target or "", ended, finding.note, finding.start


def print_result(result: AuditResult, *, strict: bool) -> None:
    """Print one audit on stdout; colours only on a terminal."""
    console = Console(highlight=False, soft_wrap=False)
    _print_head(console, result)
    _print_counts(console, result, strict=strict)
    _print_groups(console, result)
    _print_in_conversion(console, result)
    _print_limits(console, result)
    _print_last_line(console, result, strict=strict)


def _print_head(console: Console, result: AuditResult) -> None:
    console.print(Text(", ".join(result.sources), style="bold"))
    line = f"{result.events:,} events"
    if result.began is not None and result.ended is not None:
        line += f" in {_duration(result.ended - result.began)}"
    line += f", {result.conversions:,} conversions"
    console.print(line)
    for target in result.targets:
        console.print(
            Text(
                f"{target.name}: {target.maps:,} maps, {target.unmaps:,} unmaps,"
                f" {target.faults:,} faults;"
                f" {target.entries:,} mappings of {format_size(target.mapped_bytes)} at the end",
                style="dim",
            )
        )


def _print_counts(console: Console, result: AuditResult, *, strict: bool) -> None:
    if not result.counts:
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    table.add_column()
    for kind in FindingKind:
        count = result.counts.get(kind)
        if count is not None:
            style = "bold red" if strict or kind in FAILURES else ""
            table.add_row(Text(f"{count.count:,}", style), Text(kind, style), MEANINGS[kind])
    console.print()
    console.print(table)


def _print_groups(console: Console, result: AuditResult) -> None:
    groups = group(finding for finding in result.findings if finding.kind in FAILURES)
    if not groups:
        return
    several_targets = len({each.worst.target for each in groups}) > 1
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("what")
    table.add_column("range", no_wrap=True)
    for name in ("size", "after", "for"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("opened, closed")
    for each in groups[:_GROUPS_SHOWN]:
        table.add_row(*(Text(cell) for cell in _row(each, result, several_targets)))
    console.print()
    console.print(table)
    if len(groups) > _GROUPS_SHOWN:
        console.print(f"... and {len(groups) - _GROUPS_SHOWN:,} more groups (--json, --report)")
    for note in _notes(groups[:_GROUPS_SHOWN]):
        console.print(Text(note, style="dim"))


def _row(
    each: FindingGroup,
    result: AuditResult,
    several_targets: bool,  # noqa: FBT001
) -> list[str]:
    worst = each.worst
    number = len(each.findings)
    what = worst.kind if number == 1 else f"{number:,} {worst.kind}"
    if worst.target and several_targets:
        what += f" ({worst.target})"
    since = "-"
    if worst.since is not None and result.began is not None:
        since = f"{(worst.since - result.began) / 1e9:.6f} s"
    return [
        what,
        f"[{each.start:#x}, {each.end:#x})" if each.end > each.start else "-",
        format_size(each.end - each.start) if each.end > each.start else "-",
        since,
        "to the end" if worst.open else "-" if not worst.duration else _duration(worst.duration),
        _lines(each, several_files=len(result.sources) > 1),
    ]


def _lines(each: FindingGroup, *, several_files: bool) -> str:
    """Name the events, by the line alone where there is one file only."""
    first, last = each.findings[0], each.findings[-1]
    text = str(first.opened) if several_files else f"line {first.opened.line}"
    if last.opened != first.opened:
        text += f" to {last.opened.line}"
    if first.closed is not None:
        text += f", {first.closed if several_files else first.closed.line}"
    return text


def _notes(groups: Sequence[FindingGroup]) -> list[str]:
    ranges: dict[str, list[str]] = {}
    for each in groups:
        if each.worst.note:
            where = describe_range(each.start, each.end - each.start)
            ranges.setdefault(each.worst.note, []).append(where)
    return [
        f"{where[0]}: {note}" if len(where) == 1 else f"{len(where):,} of these: {note}"
        for note, where in ranges.items()
    ]


def _print_in_conversion(console: Console, result: AuditResult) -> None:
    for lengths, text in (
        (result.transitional, "private and still mapped, inside of their own conversion"),
        (result.not_yet_mapped, "shared and not mapped, inside of their own conversion (normal)"),
    ):
        if lengths.count:
            console.print(
                f"{lengths.count:,} windows {text}:"
                f" {_duration(lengths.total // lengths.count)} on average,"
                f" {_duration(lengths.longest)} at most"
            )


def _print_limits(console: Console, result: AuditResult) -> None:
    if result.unknown_lines:
        console.print(f"{result.unknown_lines:,} lines were not understood:")
        for example in result.unknown_examples[:3]:
            console.print(Text(f"  {example}", style="dim"))
    if result.limits:
        console.print("\nWhat this trace cannot show:")
        for limit in result.limits:
            console.print(Text(f"- {limit}"))


def _print_last_line(console: Console, result: AuditResult, *, strict: bool) -> None:
    if result.error is not None:
        console.print(
            Text(
                f"\nNot read to its end: {result.error}. The above is about the part before it.",
                "bold red",
            )
        )
    failures = result.failures(strict=strict)
    console.print()
    if failures:
        console.print(Text(f"{failures:,} finding{'s' * (failures > 1)}", style="bold red"))
    else:
        console.print("Nothing found" + (" in what was read." if result.error else "."))


def print_verdict(results: Sequence[AuditResult], *, strict: bool) -> None:
    """Print the last lines of an audit of several files."""
    bad = [result for result in results if result.failures(strict=strict)]
    unread = [result for result in results if result.error is not None]
    print(
        f"\n{len(results):,} recordings: {len(bad):,} with findings,"
        f" {len(unread):,} not read to the end"
    )


def _duration(nanoseconds: int) -> str:
    for unit, name in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if nanoseconds >= unit:
            return f"{nanoseconds / unit:.1f} {name}"
    return f"{nanoseconds} ns"
