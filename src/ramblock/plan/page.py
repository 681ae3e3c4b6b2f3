# SPDX-License-Identifier: Apache-2.0
"""The page of a plan: mappings over time, by policy, with the limits as lines, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO

from ramblock.errors import UsageError
from ramblock.plan.guest_plan import GuestPlan
from ramblock.plan.limits import Limits
from ramblock.plan.simulation import Simulated
from ramblock.plan.sweep import Value
from ramblock.plan.targets import TARGETS
from ramblock.plan.trace_plan import TracePlan
from ramblock.report.html import write_page
from ramblock.units import format_size

__all__ = ["write_guest_plan", "write_sweep", "write_trace_plan"]


def write_guest_plan(stream: IO[bytes], plan: GuestPlan) -> None:
    """
    Write the page of a guest that was simulated.

    :raises UsageError: Plotly is not installed, or the guest was not simulated.
    """
    if plan.simulated is None:
        raise UsageError("a plan without a simulation has no picture", expected="simulate it")
    guest = plan.guest
    summary = {
        "memory": format_size(guest.memory),
        "vCPUs": guest.vcpus,
        "devices": ", ".join(guest.devices) or "none",
        "technology": guest.technology.value,
        "shared at most, simulated": format_size(plan.simulated.peak_shared),
    }
    rows = [
        [
            each.policy,
            each.target,
            each.verdict.value,
            str(each.need.boot_entries) if each.need else "",
            str(each.need.peak_entries) if each.need else "",
            each.why,
        ]
        for each in plan.rows
    ]
    _write(
        stream,
        title=f"Plan for a guest with {format_size(guest.memory)}",
        summary=summary,
        x_title="conversions",
        lines=_series(plan.simulated),
        limits=_limit_lines(plan.limits),
        columns=["policy", "target", "verdict", "mappings at boot", "at most", "why"],
        rows=rows,
        notes=[each.setting + ": " + each.effect for each in plan.advice],
        notes_title="What would make it fit, the best first",
    )


def write_trace_plan(stream: IO[bytes], plan: TracePlan) -> None:
    """
    Write the page of a recording.

    :raises UsageError: Plotly is not installed.
    """
    summary = {
        "recording": plan.source,
        "conversions": f"{plan.simulated.conversions:,}",
        "shared at most": format_size(plan.simulated.peak_shared),
    }
    rows = [
        [
            each.policy,
            each.target,
            each.verdict.value,
            f"{each.counts.peak_entries:,}" if each.counts else "",
            f"{each.counts.entries:,}" if each.counts else "",
            each.why,
        ]
        for each in plan.rows
    ]
    limits = {each.target: each.limit for each in plan.rows if each.limit is not None}
    _write(
        stream,
        title=f"Plan from {plan.source}",
        summary=summary,
        x_title="seconds",
        lines=_series(plan.simulated),
        limits=[{"name": f"{name}: {limit:,}", "value": limit} for name, limit in limits.items()],
        columns=["policy", "target", "verdict", "most mappings", "at the end", "why"],
        rows=rows,
        notes=plan.notes,
        notes_title="Gaps of this recording",
    )


def write_sweep(
    stream: IO[bytes], rows: Sequence[Mapping[str, Value]], axis: str, limits: Limits
) -> None:
    """
    Write the page of a sweep.

    :param axis: The column that goes along the page.
    :raises UsageError: Plotly is not installed.
    """
    curves: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for policy, target in sorted({(str(each["policy"]), str(each["target"])) for each in rows}):
        curve = _curve(rows, axis, policy, target)
        if curve:
            # Targets that need the same are one line; otherwise the last would hide the others.
            curves.setdefault(curve, []).append(f"{policy} on {target}")
    lines = [
        {
            "name": ", ".join(names),
            "x": [_in_gib(axis, place) for place, _ in curve],
            "y": [entries for _, entries in curve],
        }
        for curve, names in curves.items()
    ]
    verdicts: dict[tuple[str, str, str], int] = {}
    for each in rows:
        key = str(each["policy"]), str(each["target"]), str(each["verdict"])
        verdicts[key] = verdicts.get(key, 0) + 1
    _write(
        stream,
        title="A sweep",
        summary={"guests": len({each["guest"] for each in rows}), "rows": len(rows)},
        x_title=f"{axis} in GiB" if axis == "memory" else axis,
        lines=lines,
        limits=_limit_lines(limits),
        columns=["policy", "target", "verdict", "guests"],
        rows=[[*key, f"{count:,}"] for key, count in sorted(verdicts.items())],
        notes=["each line is the high end of the most mappings at once"],
        notes_title="How to read it",
    )


def _curve(
    rows: Sequence[Mapping[str, Value]], axis: str, policy: str, target: str
) -> tuple[tuple[int, int], ...]:
    """Take the most mappings along the axis; of guests at one place, of the one that needs most."""
    most: dict[int, int] = {}
    for each in rows:
        place, entries = each[axis], each["peak_entries_high"]
        if (each["policy"], each["target"]) != (policy, target):
            continue
        if isinstance(place, int) and isinstance(entries, int):
            most[place] = max(most.get(place, 0), entries)
    return tuple(sorted(most.items()))


def _in_gib(axis: str, place: int) -> float:
    return place / (1 << 30) if axis == "memory" else place


def _series(simulated: Simulated) -> list[dict[str, object]]:
    points = simulated.series
    return [
        {
            "name": name,
            "x": [point[0] for point in points],
            "y": [point[index] for point in points],
        }
        for name, index in (("one mapping per page", 2), ("one mapping per run", 3))
    ]


def _limit_lines(limits: Limits) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for target in TARGETS:
        limit = target.max_mappings(limits)
        if limit is not None:
            found.append({"name": f"{target.name}: {limit:,}", "value": limit})
    return found


def _write(
    stream: IO[bytes],
    *,
    title: str,
    summary: Mapping[str, object],
    x_title: str,
    lines: Sequence[Mapping[str, object]],
    limits: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    notes_title: str,
) -> None:
    data = {
        "title": title,
        "summary": [[key, str(value)] for key, value in summary.items()],
        "xTitle": x_title,
        "lines": lines,
        "limits": limits,
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "notesTitle": notes_title,
    }
    write_page(stream, title=title, data=data, body="plan.html", script="plan.js", style="page.css")
