# SPDX-License-Identifier: Apache-2.0
"""A plan for people: shared memory, the needs of each policy and target, limits, settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ramblock.plan.guest_plan import GuestPlan
from ramblock.plan.row import Row, Verdict
from ramblock.plan.shares import Share
from ramblock.plan.simulation import kind_of
from ramblock.plan.span import Span
from ramblock.plan.targets import POLICIES, TARGETS
from ramblock.plan.trace_plan import TracePlan
from ramblock.units import format_size

__all__ = ["print_guest_plan", "print_trace_plan"]

_STYLES = {
    Verdict.FITS: "green",
    Verdict.UNSURE: "yellow",
    Verdict.REFUSED: "bold red",
    Verdict.IMPOSSIBLE: "dim",
}


def print_guest_plan(plan: GuestPlan) -> None:
    """Print the plan of a guest."""
    console = Console(highlight=False)
    guest = plan.guest
    print(
        f"{format_size(guest.memory)} {guest.technology.upper()} guest, {guest.vcpus} vCPUs,"
        f" devices: {', '.join(guest.devices) or 'none'}, {', '.join(guest.os)}"
    )
    _print_shares(console, plan)
    _print_rows(console, plan.rows)
    _print_costs(console, plan.rows)
    _print_limits(plan.rows)
    _print_fragmentation(plan)
    if plan.simulated is not None:
        _print_simulated(console, plan)
    if plan.advice:
        print("\nWhat would make it fit, the best first")
        for number, advice in enumerate(plan.advice, 1):
            print(f"{number}. [{advice.target}] {advice.setting}\n   {advice.effect}")
            if advice.caveat:
                print(f"   but: {advice.caveat}")


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in right else "left", no_wrap=number > 1)
    return table


def _size(span: Span) -> str:
    if span.exact:
        return format_size(span.low)
    return f"{format_size(span.low)}..{format_size(span.high)}"


def _print_shares(console: Console, plan: GuestPlan) -> None:
    print("\nWhat it shares")
    table = _table("when", "what", "size", "requests", right=(2, 3))

    def add(when: str, share: Share, size: str) -> None:
        what = Text(share.name)
        what.append(f"\n{share.why}", style="dim")
        if share.assumed:
            what.append(" [assumed]", style="yellow")
        table.add_row(when, what, size, str(share.requests))

    for share in plan.boot_shares:
        add("boot", share, _size(share.size))
    for share in plan.later_shares:
        add("later", share, _size(share.size))
    add("passing", plan.firmware, "one at a time")
    console.print(table)
    if any("accept" in profile for profile in plan.guest.os):
        print(
            "Accepting memory changes no mapping: a page is private before and after."
            "\nAll of the guest's memory is taken"
            f" {'at boot' if plan.guest.eager_accept else 'as it is used'}."
        )


def _print_rows(console: Console, rows: Sequence[Row]) -> None:
    print("\nMappings")
    table = _table("policy", "target", "", "at boot", "at most", right=(3, 4))
    cannot = []
    worst = 0
    for each in rows:
        need = each.need
        if need is None:
            cannot.append(each.target)
            continue
        table.add_row(
            each.policy,
            each.target,
            _verdict(each),
            str(need.boot_entries),
            str(need.peak_entries),
        )
        worst = need.worst_entries
    if table.row_count:
        console.print(table)
        print(
            "At the end: between what it is at boot and the most."
            f"\nWorst case, a guest that fragments on purpose: {worst:,}, one for each page."
        )
    if cannot:
        print(f"run: impossible on {', '.join(cannot)}: they cannot cut")


def _verdict(each: Row) -> Text:
    """Say whether it fits; QEMU counts all of the guest's memory, and may refuse all the same."""
    if each.verdict is not Verdict.REFUSED and each.qemu is not None and not each.qemu.passes:
        return Text(f"{each.verdict}, not QEMU", "yellow")
    return Text(each.verdict, _STYLES[each.verdict])


def _print_costs(console: Console, rows: Sequence[Row]) -> None:
    possible = [(each, each.need) for each in rows if each.need is not None]
    if not possible:
        return
    print("\nCalls")
    table = _table(
        "policy", "target", "maps at boot", "unmaps", "maps/s after", "unmaps/s", right=range(2, 6)
    )
    for each, need in possible:
        numbers = (need.boot_maps, need.boot_unmaps, need.maps_per_second, need.unmaps_per_second)
        table.add_row(each.policy, each.target, *map(str, numbers))
    console.print(table)
    print("\nMemory")
    table = _table("policy", "target", "pinned", "held twice", "IOMMU's tables", right=range(2, 5))
    for each, need in possible:
        sizes = (need.pinned, need.held_twice, need.page_tables)
        table.add_row(each.policy, each.target, *map(_size, sizes))
    console.print(table)


def _print_limits(rows: Sequence[Row]) -> None:
    lines = []
    for each in rows:
        for room in each.headroom:
            if room.left >= 0:
                left = f"{room.left:,} left"
            else:
                left = f"{-room.left:,} too many at the high end: {room.cause}"
            lines.append(f"{each.policy}, {each.target}: {room.name} = {room.limit:,}, {left}")
        check = each.qemu
        if check is not None:
            verdict = "starts" if check.passes else "refuses (possibly running out of DMA mappings)"
            lines.append(
                f"{each.policy}, {each.target}: QEMU's own check: {check.granules:,} pages"
                f" + {check.memslots:,} slots - {check.listeners} listeners = {check.needed:,},"
                f" limit {check.limit:,}: QEMU {verdict}"
            )
    if lines:
        print("\nLimits")
        print("\n".join(lines))


def _print_fragmentation(plan: GuestPlan) -> None:
    """Print the most runs that conversions can leave: see :func:`~ramblock.plan.formula.need`."""
    runs = next((each for each in plan.rows if each.policy == "run" and each.need), None)
    if runs is None or runs.need is None:
        return
    most = max(runs.need.shared.high // 4096, 1)
    boot = runs.need.boot_entries.high
    steps = [number for number in (0, 100, 10_000, 1_000_000) if number <= plan.guest.conversions]
    if plan.guest.conversions not in steps:
        steps.append(plan.guest.conversions)
    text = ", ".join(f"{number:,}: {min(boot + 2 * number, most):,}" for number in steps)
    print(f"\nRuns after so many conversions, if each of them fragments as much as it can: {text}")


def _print_simulated(console: Console, plan: GuestPlan) -> None:
    simulated = plan.simulated
    assert simulated is not None
    print(f"\nSimulated: {simulated.conversions:,} conversions")
    table = _table(
        "policy", "target", "at boot", "most", "at the end", "maps", "unmaps", right=range(2, 7)
    )  # fmt: skip
    shown = {(each.policy, each.target) for each in plan.rows}
    for target in TARGETS:
        for policy in POLICIES:
            if not target.can(policy) or (policy.value, target.name) not in shown:
                continue
            kind = kind_of(target, policy)
            boot, final = simulated.boot[kind], simulated.final[kind]
            numbers = (boot.entries, final.peak_entries, final.entries, final.maps, final.unmaps)
            table.add_row(policy.value, target.name, *(f"{number:,}" for number in numbers))
    console.print(table)


def print_trace_plan(plan: TracePlan) -> None:
    """Print the plan of a recording."""
    console = Console(highlight=False)
    simulated = plan.simulated
    print(
        f"{plan.source}: {simulated.conversions:,} conversions in {plan.seconds:.3f} s,"
        f" {format_size(simulated.peak_shared)} shared at most"
    )
    table = _table(
        "policy", "target", "", "most", "at the end", "maps", "unmaps", "limit", right=range(3, 8)
    )
    for each in plan.rows:
        verdict = Text(each.verdict, _STYLES[each.verdict])
        counts = each.counts
        if counts is None:
            continue
        numbers = (counts.peak_entries, counts.entries, counts.maps, counts.unmaps)
        limit = "none" if each.limit is None else f"{each.limit:,}"
        table.add_row(
            each.policy, each.target, verdict, *(f"{number:,}" for number in numbers), limit
        )
    if table.row_count:
        console.print(table)
    cannot = [each.target for each in plan.rows if each.counts is None]
    if cannot:
        print(f"run: impossible on {', '.join(cannot)}: they cannot cut")
    print("\nAs recorded")
    table = _table("target", "most", "at the end", "maps", "unmaps", right=range(1, 5))
    for seen in plan.observed:
        numbers = (seen.peak_entries, seen.entries, seen.maps, seen.unmaps)
        table.add_row(Text(seen.name), *(f"{number:,}" for number in numbers))
    console.print(table)
    for note in plan.notes:
        print(f"note: {note}")
