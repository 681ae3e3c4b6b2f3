# SPDX-License-Identifier: Apache-2.0
"""Plans: a guest's need of mappings, by formula, by simulation, and from a recording."""

from ramblock.plan.guest import Guest, OsProfile, Pluggable, Profile, Technology
from ramblock.plan.guest_plan import GuestPlan, plan_guest
from ramblock.plan.limits import Limits, limits_of_host
from ramblock.plan.row import Row, Verdict
from ramblock.plan.simulation import Simulated, simulate
from ramblock.plan.span import Span
from ramblock.plan.sweep import Sweep
from ramblock.plan.targets import TARGETS
from ramblock.plan.trace_plan import TracePlan, plan_trace
from ramblock.plan.workload import End

__all__ = [
    "TARGETS",
    "End",
    "Guest",
    "GuestPlan",
    "Limits",
    "OsProfile",
    "Pluggable",
    "Profile",
    "Row",
    "Simulated",
    "Span",
    "Sweep",
    "Technology",
    "TracePlan",
    "Verdict",
    "limits_of_host",
    "plan_guest",
    "plan_trace",
    "simulate",
]
