# SPDX-License-Identifier: Apache-2.0
"""The summary of a run, for people."""

from __future__ import annotations

from ramblock.cli.terminal import Cell, Styled, Terminal, out
from ramblock.errors import describe_range
from ramblock.run.report import RunReport
from ramblock.run.tally import Outcome
from ramblock.units import format_size

__all__ = ["print_summary"]

_CLASSES = ("4 KiB", "to 64 KiB", "to 2 MiB", "larger")
_RANGES_SHOWN = 8
_REASONS_SHOWN = 6


def print_summary(report: RunReport) -> None:
    """Print the report on stdout."""
    terminal = out()
    _print_head(terminal, report)
    _print_requests(terminal, report)
    _print_mappings(terminal, report)
    _print_devices(terminal, report)
    _print_refusals(terminal, report)
    _print_doubts(terminal, report)
    _print_violations(terminal, report)
    _print_verdict(terminal, report)


def _print_head(terminal: Terminal, report: RunReport) -> None:
    job = report.scenario.run
    memory = sum(place.size for place in report.places if place.confidential)
    mode = "without coordination" if job.uncoordinated else f"one mapping per {report.policy}"
    devices = _count(len(report.devices), "device")
    terminal.line(
        Styled(f"{format_size(memory)} guest, {devices}, {mode}", "bold"),
        f"; workload {job.workload}, seed {job.seed}",
    )
    seconds = report.elapsed_ns / 1e9
    interrupted = ", interrupted" if report.interrupted else ""
    rate = report.tally.requests / seconds if seconds else 0
    terminal.line(
        f"{report.tally.requests:,} requests in {seconds:.1f} s ({rate:,.0f}/s){interrupted}"
    )
    for line in _parts(report):
        terminal.line(Styled(line, "dim"))


def _parts(report: RunReport) -> list[str]:
    """Say which parts were real, and which only tracked."""
    guest = report.guest
    lines = []
    if guest.kind == "script":
        why = f" ({guest.why})" if guest.why else ""
        lines.append(f"Page states are tracked, not enforced: there is no KVM in this run{why}.")
    else:
        lines.append(
            f"The guest is a program on KVM, in a VM of type {guest.vm_type};"
            f" it asks by {guest.call}."
        )
        lines.append(
            "The kernel enforces page states; private pages are in guest_memfd."
            if guest.enforced
            else "Page states are tracked, not enforced: this KVM does not know private pages."
            f" Private pages would be in {guest.private}, where the guest does not reach it."
        )
    lines += [
        f"{name}: {description}."
        for name, description in report.targets.items()
        if description != "software"
    ]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_requests(terminal: Terminal, report: RunReport) -> None:
    tally = report.tally
    rows: list[list[Cell]] = []
    for outcome in Outcome:
        if tally.outcomes[outcome]:
            cells = [f"{tally.by_class[name, outcome]:,}" for name in _CLASSES]
            rows.append([outcome.value, *cells, f"{tally.outcomes[outcome]:,}"])
    latencies = tally.latencies()
    for key in ("p50", "p90", "p99", "max"):
        cells = [f"{latencies[name][key]:,.0f}" if name in latencies else "-" for name in _CLASSES]
        rows.append([Styled(cell, "dim") for cell in (f"{key}, µs", *cells, "")])
    _print_title(terminal, "Requests by size")
    terminal.table(rows, header=["", *_CLASSES, "all"], right=range(1, 6))


def _print_mappings(terminal: Terminal, report: RunReport) -> None:
    tally, per_page = report.tally, report.per_page()
    rows = []
    if report.entries:
        rows = [
            ("map calls", f"{tally.map_calls:,}", f"one per page: {per_page['map_calls']:,}"),
            ("unmap calls", f"{tally.unmap_calls:,}", f"one per page: {per_page['unmap_calls']:,}"),
            (
                "entries, at most",
                f"{report.peak_entries:,}",
                f"one per page: {per_page['peak_entries']:,}",
            ),
            ("entries, now", f"{sum(report.entries.values()):,}", _kernel_count(report)),
        ]
    rows += [
        (
            "memory really freed",
            format_size(report.freed_bytes),
            f"waiting: {format_size(report.not_freed_bytes)}",
        ),
    ]
    if report.orphaned_bytes:
        rows.append(
            ("freed while mapped", format_size(report.orphaned_bytes), "devices still reach it")
        )
    other = max(report.elapsed_ns - tally.conversion_ns - report.watching_ns, 0)
    rows += [
        ("time in conversions", f"{tally.conversion_ns / 1e9:.1f} s", ""),
        (
            "the run's own time",
            f"{report.watching_ns / 1e9:.1f} s verifier",
            f"{other / 1e9:.1f} s script and devices",
        ),
    ]
    _print_rows(terminal, "Mappings, memory, time", rows)


def _kernel_count(report: RunReport) -> str:
    if not report.kernel_entries:
        return ""
    return f"the kernel counts {sum(report.kernel_entries.values()):,}"


def _print_devices(terminal: Terminal, report: RunReport) -> None:
    total = report.devices_total()
    _print_rows(
        terminal,
        "DMA",
        [
            ("own buffers", f"{total.accesses:,} accesses", f"{total.faults_own:,} faulted"),
            (
                "memory never shared",
                f"{total.forbidden:,} accesses",
                f"{total.forbidden_faulted:,} faulted",
            ),
            ("anywhere", f"{total.probes:,} accesses", f"{total.probes_faulted:,} faulted"),
        ]
        + (
            [
                (
                    "a sample, at the end",
                    f"{total.audited:,} accesses",
                    f"{total.audited_faulted:,} faulted",
                )
            ]
            if total.audited
            else []
        ),
    )


def _print_refusals(terminal: Terminal, report: RunReport) -> None:
    reasons = report.tally.reasons.most_common()
    rows = [(f"{count:,}", reason, "") for reason, count in reasons[:_REASONS_SHOWN]]
    if len(reasons) > _REASONS_SHOWN:
        rows.append(
            (f"{sum(count for _, count in reasons[_REASONS_SHOWN:]):,}", "for other reasons", "")
        )
    if rows:
        _print_rows(terminal, "Refused or put back", rows)
    if report.injected:
        _print_rows(
            terminal,
            "Faults on purpose",
            [(kind, f"{count:,}", "") for kind, count in report.injected.items()],
        )


def _print_doubts(terminal: Terminal, report: RunReport) -> None:
    if report.in_doubt:
        rows = [
            (describe_range(gpa, size), target, format_size(size))
            for gpa, size, target in report.in_doubt
        ]
        _print_rows(terminal, "In doubt: a device may still reach this", rows[:_RANGES_SHOWN])


def _print_violations(terminal: Terminal, report: RunReport) -> None:
    if report.verifier.clean:
        return
    kinds = [(f"{count:,}", kind.value, "") for kind, count in report.verifier.counts.most_common()]
    _print_rows(terminal, "Violations", kinds, style="red")
    found = report.verifier.violations()
    for kind in dict.fromkeys(violation.kind for violation in found):
        ranges = [violation for violation in found if violation.kind is kind]
        rows = [
            (describe_range(item.gpa, item.size), format_size(item.size), item.target)
            for item in ranges[:_RANGES_SHOWN]
        ]
        more = len(ranges) - _RANGES_SHOWN
        if more > 0:
            rows.append((f"... and {more} more", "", ""))
        _print_rows(terminal, kind.value, rows, style="red")


def _print_verdict(terminal: Terminal, report: RunReport) -> None:
    terminal.line()
    for error in report.device_errors:
        terminal.line(Styled(f"a device failed: {error}", "bold red"))
    if report.miscounted:
        terminal.line(Styled("the kernel counts other mappings than we do", "bold red"))
    if report.poisoned:
        terminal.line(
            Styled(
                "POISONED: a device may still reach pages. They are kept; the guest was stopped.",
                "bold red",
            )
        )
    checks = f"{report.verifier.checks:,} calls checked, everything compared at the end"
    if report.verifier.clean:
        terminal.line(Styled("0 violations", "bold green"), f" ({checks})")
    else:
        count = report.verifier.counts.total()
        terminal.line(Styled(f"{count:,} violations", "bold red"), f" ({checks})")


def _print_rows(
    terminal: Terminal, title: str, rows: list[tuple[str, str, str]], style: str = ""
) -> None:
    _print_title(terminal, title, style)
    terminal.table(rows)


def _print_title(terminal: Terminal, title: str, style: str = "") -> None:
    terminal.line()
    terminal.line(Styled(title, f"bold {style}"))
