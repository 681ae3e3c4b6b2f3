# SPDX-License-Identifier: Apache-2.0
"""A plan for a guest: every policy on every target, and settings where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ramblock.dma.target import MappingPolicy
from ramblock.plan.advice import Advice, advise
from ramblock.plan.guest import Guest
from ramblock.plan.limits import Limits
from ramblock.plan.row import Row, Verdict, row
from ramblock.plan.shares import Share, boot_shares, buffers, firmware, later_shares
from ramblock.plan.simulation import Simulated, simulate
from ramblock.plan.targets import POLICIES, TARGETS, TargetKind
from ramblock.plan.workload import End

__all__ = ["GuestPlan", "plan_guest"]


class GuestPlan(msgspec.Struct, kw_only=True):
    """Everything that is known before the start."""

    guest: Guest
    limits: Limits
    boot_shares: list[Share]
    later_shares: list[Share]
    firmware: Share
    rows: list[Row]
    advice: list[Advice]
    """Best first; empty where all rows fit."""
    simulated: Simulated | None = None

    @property
    def hopeless(self) -> bool:
        """Whether none of the rows can work."""
        return all(each.verdict in (Verdict.REFUSED, Verdict.IMPOSSIBLE) for each in self.rows)


def plan_guest(
    guest: Guest,
    limits: Limits,
    *,
    policies: Sequence[MappingPolicy] = POLICIES,
    targets: Sequence[TargetKind] = TARGETS,
    end: End | None = None,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> GuestPlan:
    """
    Plan for a guest.

    :param end: Also simulate it, at this end of the ranges.
    :param progress: Of the simulation; called with the number of conversions since the last call.
    :raises UsageError: A value of the guest makes no sense.
    """
    guest.check()
    every = [row(guest, policy, target, limits) for target in TARGETS for policy in POLICIES]
    wanted = {(policy.value, target.name) for policy in policies for target in targets}
    rows = [each for each in every if (each.policy, each.target) in wanted]
    # The choice that would fit instead may be one that was not asked for.
    lacking = {(each.policy, each.target) for each in rows}
    others = [each for each in every if (each.policy, each.target) not in lacking]
    fine = [each for each in others if each.verdict is Verdict.FITS and each.qemu is None]
    return GuestPlan(
        guest=guest,
        limits=limits,
        boot_shares=boot_shares(guest),
        later_shares=[*later_shares(guest), buffers(guest)],
        firmware=firmware(),
        rows=rows,
        advice=advise(guest, [*rows, *fine]),
        simulated=None if end is None else simulate(guest, end, seed=seed, progress=progress),
    )
