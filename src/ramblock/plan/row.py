# SPDX-License-Identifier: Apache-2.0
"""One line of a plan: a policy, a target, its needs, and the limits in the way."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ramblock.dma.target import MappingPolicy
from ramblock.plan.formula import Need, need, total_size
from ramblock.plan.guest import Guest
from ramblock.plan.limits import Limits
from ramblock.plan.qemu_check import QemuCheck, check_as_qemu
from ramblock.plan.shares import boot_shares, buffers, later_shares
from ramblock.plan.span import Span
from ramblock.plan.targets import TargetKind
from ramblock.units import PAGE_SIZE, format_size

__all__ = ["Headroom", "Row", "Verdict", "row"]


class Verdict(StrEnum):
    """Whether a guest will start, and go on."""

    FITS = "fits"
    UNSURE = "may not fit"
    """It fits at the low end of the range and not at the high end."""
    REFUSED = "refused"
    """It does not fit even at the low end."""
    IMPOSSIBLE = "impossible"
    """The target cannot follow the policy."""


_ORDER = list(Verdict)


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """How far something is from a limit."""

    name: str
    limit: int
    need: Span
    left: int
    """At the high end; negative: how much is missing."""
    verdict: Verdict
    cause: str
    """The cause, in words; empty where it fits."""
    fails_at: int | None = None
    """
    Bytes of shared memory that cannot be mapped any more.

    None: it fits, or mappings are not counted in pages.
    """
    counts_mappings: bool = False
    """Whether the limit is one of mappings, else of bytes."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one policy on one target."""

    policy: str
    target: str
    verdict: Verdict
    why: str
    need: Need | None = None
    """None: impossible."""
    headroom: list[Headroom] = []
    qemu: QemuCheck | None = None
    """Where QEMU checks; it has the policy ``page`` alone."""


def row(guest: Guest, policy: MappingPolicy, target: TargetKind, limits: Limits) -> Row:
    """Make the line of *policy* on *target*."""
    if not target.can(policy):
        return Row(
            policy=policy.value,
            target=target.name,
            verdict=Verdict.IMPOSSIBLE,
            why=f"{target.name} cannot cut: a mapping has to be unmapped whole,"
            " so it must be no larger than a page",
        )
    wanted = need(guest, policy, target)
    least = total_size(boot_shares(guest)).low
    if least > guest.memory:
        return Row(
            policy=policy.value,
            target=target.name,
            verdict=Verdict.REFUSED,
            why=f"the guest would share {format_size(least)} at boot,"
            f" and has {format_size(guest.memory)}",
            need=wanted,
        )
    headroom = _headroom(guest, policy, target, limits, wanted)
    worst = max(headroom, key=lambda each: _ORDER.index(each.verdict), default=None)
    limit = target.max_mappings(limits)
    qemu = None
    if target.checked_by_qemu and policy is MappingPolicy.PAGE and limit is not None:
        qemu = check_as_qemu(guest, limit, limits.memslots)
    return Row(
        policy=policy.value,
        target=target.name,
        verdict=Verdict.FITS if worst is None else worst.verdict,
        why="" if worst is None else worst.cause,
        need=wanted,
        headroom=headroom,
        qemu=qemu,
    )


def _headroom(
    guest: Guest, policy: MappingPolicy, target: TargetKind, limits: Limits, wanted: Need
) -> list[Headroom]:
    found = []
    limit = target.max_mappings(limits)
    if limit is not None:
        entries = Span(
            wanted.boot_entries.low, wanted.peak_entries.expected, wanted.peak_entries.high
        )
        fails_at = None
        if policy is MappingPolicy.PAGE and entries.high > limit:
            fails_at = (limit + 1) * PAGE_SIZE
        cause = _who_crosses(guest, limit, fails_at) if fails_at is not None else ""
        found.append(
            _compare(target.limit_name, limit, entries, cause, fails_at, counts_mappings=True)
        )
    if limits.memlock is not None and target.pins:
        cause = "mapped memory is pinned, and pinned memory counts as locked"
        found.append(_compare("RLIMIT_MEMLOCK", limits.memlock, wanted.pinned, cause))
    if limits.cgroup is not None:
        # Memory that was accepted has a page of the host's; the rest may never be touched.
        least = guest.memory if guest.eager_accept else total_size(boot_shares(guest)).low
        least = min(least, guest.memory)
        held = Span(least, guest.memory, guest.most_memory)
        held += wanted.held_twice + wanted.page_tables
        found.append(
            _compare("memory of the control group", limits.cgroup, held,
                     "the guest's memory, the part that is held twice, and the IOMMU's tables")
        )  # fmt: skip
    return found


def _compare(
    name: str,
    limit: int,
    wanted: Span,
    cause: str,
    fails_at: int | None = None,
    *,
    counts_mappings: bool = False,
) -> Headroom:
    if wanted.high <= limit:
        verdict, cause = Verdict.FITS, ""
    else:
        verdict = Verdict.REFUSED if wanted.low > limit else Verdict.UNSURE
    return Headroom(
        name=name,
        limit=limit,
        need=wanted,
        left=limit - wanted.high,
        verdict=verdict,
        cause=cause,
        fails_at=fails_at,
        counts_mappings=counts_mappings,
    )


def _who_crosses(guest: Guest, limit: int, fails_at: int) -> str:
    """Say in which piece of shared memory the limit is reached."""
    size = format_size(fails_at)
    first = f"{limit:,} mappings of a page each: first fails at {size} of shared memory"
    total = 0
    for share in [*boot_shares(guest), *later_shares(guest), buffers(guest)]:
        total += share.size.high
        if total >= fails_at:
            return f"{first} ({share.name}: {_sizes(share.size)})"
    return first


def _sizes(size: Span) -> str:
    if size.exact:
        return format_size(size.low)
    return f"{format_size(size.low)}..{format_size(size.high)}"
