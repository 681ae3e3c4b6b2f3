# SPDX-License-Identifier: Apache-2.0
"""An audit for people: findings worst first, then faults, notes, limits, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from ramblock.check.groups import FindingGroup, group_faults, group_neighbours, group_notes
from ramblock.check.verdict import Judgement, Verdict, failing_kinds
from ramblock.cli.terminal import Cell, Styled, Terminal, out
from ramblock.errors import describe_range
from ramblock.trace.findings import MEANINGS, Finding, FindingKind
from ramblock.trace.result import AuditResult
from ramblock.units import PAGE_SIZE, format_size

__all__ = ["print_result", "print_verdict"]

_GROUPS_SHOWN, _FAULTS_SHOWN = 20, 8
_EXAMPLES_SHOWN = 3


def print_result(result: AuditResult, judgement: Judgement, *, strict: bool) -> None:
    """Print one audit on stdout."""
    terminal = out()
    failing = failing_kinds(strict=strict)
    failures = [
        finding
        for finding in result.findings
        if finding.kind in failing and finding.kind is not FindingKind.FAULT
    ]
    notes = [finding for finding in result.findings if finding.kind not in failing]
    terminal.line(Styled(", ".join(result.sources), "bold"))
    if result.events or result.error is None:
        _print_head(terminal, result)
        _print_counts(terminal, result, failing)
        _print_failures(terminal, result, failures)
        _print_faults(terminal, result)
        _print_notes(terminal, result, notes)
        _print_in_conversion(terminal, result)
        _print_limits(terminal, result)
    _print_last_lines(terminal, result, judgement)


def _print_head(terminal: Terminal, result: AuditResult) -> None:
    line = f"{result.events:,} events"
    if result.began is not None and result.ended is not None:
        line += f" in {_duration(result.ended - result.began)}"
    terminal.line(f"{line}, {result.conversions:,} conversions")
    for target in result.targets:
        text = (
            f"{target.name}: {target.maps:,} maps, {target.unmaps:,} unmaps;"
            f" {target.entries:,} mappings of {format_size(target.mapped_bytes)} at the end"
        )
        terminal.line(Styled(text, "dim"), hang=2)


def _print_counts(terminal: Terminal, result: AuditResult, failing: frozenset[FindingKind]) -> None:
    rows: list[list[Cell]] = [
        [Styled(f"{count.count:,}", "bold red"), Styled(kind, "bold red"), MEANINGS[kind]]
        for kind in FindingKind
        if kind in failing and (count := result.counts.get(kind)) is not None
    ]
    if rows:
        terminal.line()
        terminal.table(rows, right=(0,))


def _print_failures(terminal: Terminal, result: AuditResult, failures: list[Finding]) -> None:
    groups = group_neighbours(failures)
    shown = groups[:_GROUPS_SHOWN]
    several_targets = len({each.worst.target for each in groups}) > 1
    if shown:
        terminal.line()
    terminal.table(
        [_row(each, result, several_targets=several_targets) for each in shown],
        header=["what", "range", "size", "after", "for", "opened, closed"],
        right=(2, 3, 4),
    )
    _print_more(terminal, len(groups))
    for remark in _remarks(shown):
        terminal.line(Styled(remark, "dim"), hang=2)
    if any(each.grace for each in shown):
        terminal.line("* With a longer --grace it may be none.")


def _row(each: FindingGroup, result: AuditResult, *, several_targets: bool) -> list[Cell]:
    worst = each.worst
    what = _count(each, worst.kind)
    if worst.target and several_targets:
        what += f" ({worst.target})"
    length = (
        "to the end" if worst.open else "-" if not worst.duration else _duration(worst.duration)
    )
    return [
        what,
        describe_range(each.start, each.end - each.start) if each.end > each.start else "-",
        format_size(each.end - each.start) if each.end > each.start else "-",
        _after(worst, result),
        f"{length} *" if each.grace else length,
        _lines(each, several_files=len(result.sources) > 1),
    ]


def _count(each: FindingGroup, kind: str) -> str:
    number = len(each.findings)
    return kind if number == 1 else f"{number:,} {kind}"


def _after(finding: Finding, result: AuditResult) -> str:
    """Tell when it began: seconds since the trace did, as in JSON and HTML."""
    if finding.since is None or result.began is None:
        return "-"
    return f"{(finding.since - result.began) / 1e9:.6f} s"


def _lines(each: FindingGroup, *, several_files: bool) -> str:
    """Name the events, by the line alone where there is one file only."""
    first, last = each.findings[0], each.findings[-1]
    text = str(first.opened) if several_files else f"line {first.opened.line}"
    if last.opened != first.opened:
        text += f" to {last.opened.line}"
    if first.closed is not None:
        text += f", {first.closed if several_files else first.closed.line}"
    return text


def _remarks(groups: Sequence[FindingGroup]) -> list[str]:
    ranges: dict[str, list[str]] = {}
    for each in groups:
        if each.worst.note:
            where = describe_range(each.start, each.end - each.start)
            ranges.setdefault(each.worst.note, []).append(where)
    return [
        f"{where[0]}: {note}" if len(where) == 1 else f"{len(where):,} of these: {note}"
        for note, where in ranges.items()
    ]


def _print_faults(terminal: Terminal, result: AuditResult) -> None:
    groups = group_faults(result.findings)
    if not groups:
        return
    terminal.line()
    number = sum(each.number for each in groups)
    title = f"Faults: {number:,} accesses that the IOMMU refused, by device and page"
    terminal.line(Styled(title, "bold"))
    rows: list[list[Cell]] = []
    for each in groups[:_FAULTS_SHOWN]:
        first = each.first
        who = first.device or first.target or "-"
        page = f"{first.start // PAGE_SIZE * PAGE_SIZE:#x}"
        lines = _lines(each, several_files=len(result.sources) > 1)
        rows.append(
            [f"{each.number:,}", who, page, _after(first, result), first.note or "-", lines]
        )
    terminal.table(
        rows,
        header=["number", "device", "page", "first after", "which", "at"],
        right=(0, 3),
    )
    _print_more(terminal, len(groups), _FAULTS_SHOWN)


def _print_notes(terminal: Terminal, result: AuditResult, notes: list[Finding]) -> None:
    groups = group_notes(notes)
    if not groups:
        return
    counts = ", ".join(
        f"{count.count:,} {kind}"
        for kind, count in sorted(result.counts.items(), key=lambda each: -each[1].count)
        if any(each.first.kind is kind for each in groups)
    )
    terminal.line()
    terminal.line(Styled("Notes", "bold"), f", which are no failures without --strict: {counts}")
    rows: list[list[Cell]] = []
    for each in groups[:_GROUPS_SHOWN]:
        first = each.first
        rows.append(
            [
                _count(each, first.kind),
                describe_range(each.start, each.end - each.start) if each.end > each.start else "-",
                _after(first, result),
                _lines(each, several_files=len(result.sources) > 1),
                "; ".join(filter(None, (first.target, first.note))) or "-",
            ]
        )
    terminal.table(rows, header=["what", "in", "first after", "at", "of"], right=(2,))
    _print_more(terminal, len(groups))
    for kind in {each.first.kind for each in groups}:
        count = result.counts[kind]
        if count.kept < count.count:
            terminal.line(f"(Of {count.count:,} {kind} the worst {count.kept:,} are listed.)")


def _print_more(terminal: Terminal, groups: int, shown: int = _GROUPS_SHOWN) -> None:
    if groups > shown:
        terminal.line(f"... and {groups - shown:,} more groups (--json, --report)")


def _print_in_conversion(terminal: Terminal, result: AuditResult) -> None:
    if result.transitional.count or result.not_yet_mapped.count:
        terminal.line()
    for lengths, text in (
        (result.transitional, "private and still mapped, inside of their own conversion"),
        (result.not_yet_mapped, "shared and not mapped, inside of their own conversion (normal)"),
    ):
        if lengths.count:
            terminal.line(
                f"{lengths.count:,} windows {text}:"
                f" {_duration(lengths.total // lengths.count)} on average,"
                f" {_duration(lengths.longest)} at most"
            )


def _print_limits(terminal: Terminal, result: AuditResult) -> None:
    if result.unknown_lines:
        terminal.line(f"{result.unknown_lines:,} lines were not understood:")
        for example in result.unknown_examples[:_EXAMPLES_SHOWN]:
            terminal.line(Styled(f"  {example}", "dim"), hang=4)
    if result.limits:
        terminal.line()
        terminal.line("What this trace cannot show:")
        for limit in result.limits:
            terminal.line(f"- {limit}", hang=2)


def _print_last_lines(terminal: Terminal, result: AuditResult, judgement: Judgement) -> None:
    terminal.line()
    if result.error is not None:
        terminal.line(Styled(result.error, "bold red"), hang=2)
    if judgement.verdict is Verdict.CANNOT_TELL:
        first, *others = result.cannot_tell
        terminal.line(Styled(f"{judgement.sentence}: ", "bold yellow"), first, hang=2)
        for reason in others:
            terminal.line(f"- {reason}", hang=2)
    elif judgement.verdict is Verdict.CLEAN:
        terminal.line(f"{judgement.sentence}.")
    else:
        terminal.line(Styled(judgement.sentence, "bold red"))


def print_verdict(judgements: Sequence[Judgement]) -> None:
    """Print the last line of an audit of several files."""
    counts = ", ".join(
        f"{number:,} {text}"
        for verdict, text in (
            (Verdict.FOUND, "with findings"),
            (Verdict.UNREADABLE, "not read to the end"),
            (Verdict.CANNOT_TELL, "cannot tell"),
            (Verdict.CLEAN, "clean"),
        )
        if (number := sum(each.verdict is verdict for each in judgements))
    )
    terminal = out()
    terminal.line()
    terminal.line(f"{len(judgements):,} recordings: {counts}")


def _duration(nanoseconds: int) -> str:
    for unit, name in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if nanoseconds >= unit:
            return f"{nanoseconds / unit:.1f} {name}"
    return f"{nanoseconds} ns"
