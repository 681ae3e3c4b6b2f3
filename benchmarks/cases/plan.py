# SPDX-License-Identifier: Apache-2.0
"""``ramblock plan``: guests per second by formula, on one core, and conversions per second in a simulation."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter_ns

from harness.context import Context
from harness.measure import Row, Summary
from ramblock.plan import Guest, Limits, Profile, Sweep, simulate
from ramblock.units import GIB, MIB

__all__ = ["CASE", "run"]

CASE = "plan: guests and conversions"

_PLAN = "ramblock plan"
_SECOND = 10**9
_CHUNK = 100


def run(context: Context) -> Iterator[Row]:
    """Yield a row for a sweep, with all policies and targets, and one for a simulated boot."""
    context.say(CASE)
    yield _sweep(context.choose(500, 10_000))
    yield _simulation(context.choose(1, 5))


def _sweep(guests: int) -> Row:
    values = tuple(str(GIB + number * MIB) for number in range(guests))
    base = Guest(memory=GIB, devices=(Profile.GPU_CC, Profile.NIC))
    sweep = Sweep(guest=base, limits=Limits(), axes=(("memory", values),))
    points = list(sweep.points())
    rates = []
    for first in range(0, guests, _CHUNK):
        before = perf_counter_ns()
        rows = sweep.rows(first, points[first : first + _CHUNK])
        rates.append(_CHUNK * _SECOND / (perf_counter_ns() - before))
        if len(rows) != 10 * _CHUNK:
            raise RuntimeError(f"{len(rows)} rows for {_CHUNK} guests")
    return Row(
        case=CASE,
        parameters={"what": "guests by formula", "size": f"{guests:,} guests, 10 rows each"},
        results={_PLAN: Summary.of(rates)},
        unit="/s",
    )


def _simulation(rounds: int) -> Row:
    guest = Guest(memory=16 * GIB, devices=(Profile.GPU_CC,))
    rates = []
    calls = 0
    for _ in range(rounds):
        before = perf_counter_ns()
        simulated = simulate(guest)
        rates.append(simulated.conversions * _SECOND / (perf_counter_ns() - before))
        calls = sum(counts.maps + counts.unmaps for counts in simulated.final.values())
    return Row(
        case=CASE,
        parameters={"what": "conversions simulated", "size": "16 GiB guest with a GPU"},
        results={_PLAN: Summary.of(rates)},
        facts={"calls of the three mappers": calls},
        unit="/s",
    )
