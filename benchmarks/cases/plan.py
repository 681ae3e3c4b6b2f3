# SPDX-License-Identifier: Apache-2.0
"""``ramblock plan``: guests per second by formula, conversions per second in a simulation."""

from __future__ import annotations

from collections.abc import Iterator
from time import thread_time_ns

from harness.context import Context
from harness.rows import Row, Samples
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
    samples = Samples()
    for first in range(0, guests, _CHUNK):
        before = thread_time_ns()
        rows = sweep.rows(first, points[first : first + _CHUNK])
        samples.add(_PLAN, [_CHUNK * _SECOND / (thread_time_ns() - before)])
        if len(rows) != 10 * _CHUNK:
            raise RuntimeError(f"{len(rows)} rows for {_CHUNK} guests")
    return samples.row(
        CASE,
        {"what": "guests by formula", "size": f"{guests:,} guests, 10 rows each"},
        unit="/s",
    )


def _simulation(rounds: int) -> Row:
    guest = Guest(memory=16 * GIB, devices=(Profile.GPU_CC,))
    samples = Samples()
    calls = 0
    for _ in range(rounds):
        before = thread_time_ns()
        simulated = simulate(guest)
        samples.add(_PLAN, [simulated.conversions * _SECOND / (thread_time_ns() - before)])
        calls = sum(counts.maps + counts.unmaps for counts in simulated.final.values())
    return samples.row(
        CASE,
        {"what": "conversions simulated", "size": "16 GiB guest with a GPU"},
        facts={"calls of the three mappers": calls},
        unit="/s",
    )
