# SPDX-License-Identifier: Apache-2.0
"""A plan for people: shared memory, the needs of each policy and target, limits, settings."""

from __future__ import annotations

from collections.abc import Sequence

from ramblock.cli.terminal import Cell, Line, Styled, Terminal, out
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
    terminal = out()
    guest = plan.guest
    terminal.line(
        f"{format_size(guest.memory)} {guest.technology.upper()} guest, {guest.vcpus} vCPUs,"
        f" devices: {', '.join(guest.devices) or 'none'}, {', '.join(guest.os)}"
    )
    _print_shares(terminal, plan)
    _print_rows(terminal, plan.rows)
    _print_costs(terminal, plan.rows)
    _print_limits(terminal, plan.rows)
    _print_fragmentation(terminal, plan)
    if plan.simulated is not None:
        _print_simulated(terminal, plan)
    if plan.advice:
        terminal.line()
        terminal.line("What would make it fit, the best first")
        for number, advice in enumerate(plan.advice, 1):
            terminal.line(f"{number}. [{advice.target}] {advice.setting}", hang=3)
            terminal.line(f"   {advice.effect}", hang=3)
            if advice.caveat:
                terminal.line(f"   but: {advice.caveat}", hang=3)


def _size(span: Span) -> str:
    if span.exact:
        return format_size(span.low)
    return f"{format_size(span.low)}..{format_size(span.high)}"


def _print_shares(terminal: Terminal, plan: GuestPlan) -> None:
    terminal.line()
    terminal.line("What it shares")
    terminal.table(
        [
            *(_share("boot", share, _size(share.size)) for share in plan.boot_shares),
            *(_share("later", share, _size(share.size)) for share in plan.later_shares),
            _share("passing", plan.firmware, "one at a time"),
        ],
        header=["when", "what", "size", "requests"],
        right=(2, 3),
    )
    if any("accept" in profile for profile in plan.guest.os):
        when = "at boot" if plan.guest.eager_accept else "as it is used"
        terminal.line("Accepting memory changes no mapping: a page is private before and after.")
        terminal.line(f"All of the guest's memory is taken {when}.")


def _share(when: str, share: Share, size: str) -> list[Cell]:
    why: Line = Styled(share.why, "dim")
    if share.assumed:
        why = (Styled(share.why, "dim"), Styled(" [assumed]", "yellow"))
    return [when, [share.name, why], size, str(share.requests)]


def _print_rows(terminal: Terminal, rows: Sequence[Row]) -> None:
    terminal.line()
    terminal.line("Mappings")
    table: list[list[Cell]] = []
    cannot = []
    worst = 0
    for each in rows:
        need = each.need
        if need is None:
            cannot.append(each.target)
            continue
        entries = (str(need.boot_entries), str(need.peak_entries))
        table.append([each.policy, each.target, _verdict(each), *entries])
        worst = need.worst_entries
    if table:
        terminal.table(table, header=["policy", "target", "", "at boot", "at most"], right=(3, 4))
        terminal.line("At the end: between what it is at boot and the most.")
        terminal.line(
            f"Worst case, a guest that fragments on purpose: {worst:,}, one for each page."
        )
    if cannot:
        terminal.line(f"run: impossible on {', '.join(cannot)}: they cannot cut")


def _verdict(each: Row) -> Styled:
    """Say whether it fits; QEMU counts all of the guest's memory, and may refuse all the same."""
    if each.verdict is not Verdict.REFUSED and each.qemu is not None and not each.qemu.passes:
        return Styled(f"{each.verdict}, not QEMU", "yellow")
    return Styled(each.verdict, _STYLES[each.verdict])


def _print_costs(terminal: Terminal, rows: Sequence[Row]) -> None:
    possible = [(each, each.need) for each in rows if each.need is not None]
    if not possible:
        return
    terminal.line()
    terminal.line("Calls")
    terminal.table(
        [
            [
                each.policy, each.target, str(need.boot_maps), str(need.boot_unmaps),
                str(need.maps_per_second), str(need.unmaps_per_second),
            ]
            for each, need in possible
        ],
        header=["policy", "target", "maps at boot", "unmaps", "maps/s after", "unmaps/s"],
        right=range(2, 6),
    )  # fmt: skip
    terminal.line()
    terminal.line("Memory")
    terminal.table(
        [
            [
                each.policy,
                each.target,
                *map(_size, (need.pinned, need.held_twice, need.page_tables)),
            ]
            for each, need in possible
        ],
        header=["policy", "target", "pinned", "held twice", "IOMMU's tables"],
        right=range(2, 5),
    )


def _print_limits(terminal: Terminal, rows: Sequence[Row]) -> None:
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
        terminal.line()
        terminal.line("Limits")
        for line in lines:
            terminal.line(line, hang=2)


def _print_fragmentation(terminal: Terminal, plan: GuestPlan) -> None:
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
    terminal.line()
    terminal.line(
        f"Runs after so many conversions, if each of them fragments as much as it can: {text}"
    )


def _print_simulated(terminal: Terminal, plan: GuestPlan) -> None:
    simulated = plan.simulated
    assert simulated is not None
    terminal.line()
    terminal.line(f"Simulated: {simulated.conversions:,} conversions")
    table: list[list[Cell]] = []
    shown = {(each.policy, each.target) for each in plan.rows}
    for target in TARGETS:
        for policy in POLICIES:
            if not target.can(policy) or (policy.value, target.name) not in shown:
                continue
            kind = kind_of(target, policy)
            boot, final = simulated.boot[kind], simulated.final[kind]
            numbers = (boot.entries, final.peak_entries, final.entries, final.maps, final.unmaps)
            table.append([policy.value, target.name, *(f"{number:,}" for number in numbers)])
    terminal.table(
        table,
        header=["policy", "target", "at boot", "most", "at the end", "maps", "unmaps"],
        right=range(2, 7),
    )


def print_trace_plan(plan: TracePlan) -> None:
    """Print the plan of a recording."""
    terminal = out()
    simulated = plan.simulated
    terminal.line(
        f"{plan.source}: {simulated.conversions:,} conversions in {plan.seconds:.3f} s,"
        f" {format_size(simulated.peak_shared)} shared at most"
    )
    if plan.cannot_tell is not None:
        # All of the ways would "fit", which says nothing.
        _print_notes(terminal, plan)
        terminal.line(Styled("Cannot tell: ", "bold yellow"), plan.cannot_tell, hang=2)
        return
    table: list[list[Cell]] = []
    for each in plan.rows:
        verdict = Styled(each.verdict, _STYLES[each.verdict])
        counts = each.counts
        if counts is None:
            continue
        numbers = (counts.peak_entries, counts.entries, counts.maps, counts.unmaps)
        limit = "none" if each.limit is None else f"{each.limit:,}"
        table.append(
            [each.policy, each.target, verdict, *(f"{number:,}" for number in numbers), limit]
        )
    terminal.table(
        table,
        header=["policy", "target", "", "most", "at the end", "maps", "unmaps", "limit"],
        right=range(3, 8),
    )
    cannot = [each.target for each in plan.rows if each.counts is None]
    if cannot:
        terminal.line(f"run: impossible on {', '.join(cannot)}: they cannot cut")
    if plan.observed:
        terminal.line()
        terminal.line("As recorded")
    observed: list[list[Cell]] = []
    for seen in plan.observed:
        numbers = (seen.peak_entries, seen.entries, seen.maps, seen.unmaps)
        observed.append([seen.name, *(f"{number:,}" for number in numbers)])
    terminal.table(
        observed,
        header=["target", "most", "at the end", "maps", "unmaps"],
        right=range(1, 5),
    )
    _print_notes(terminal, plan)


def _print_notes(terminal: Terminal, plan: TracePlan) -> None:
    for note in plan.notes:
        terminal.line(f"note: {note}", hang=6)
