# SPDX-License-Identifier: Apache-2.0
"""
``--against``: this version beside another one, ``convert`` of 4 KiB with one target and with two.

New processes, in turn, one of each version in every round; a slow minute is everybody's. The ratio
is that of the best deciles over all rounds; beside it the quartiles of the ratios that single
rounds gave, which tell how much of it is chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

from harness.context import Context
from harness.measure import Summary
from harness.rows import Row, Samples
from harness.versions import OWN_SOURCE, TARGETS, Turn, take_turn

__all__ = ["CASE", "OTHER", "OWN", "run"]

CASE = "convert 4 KiB, this version against another"
OWN, OTHER = "this version", "the other"


def run(context: Context, other: Path) -> Iterator[Row]:
    """
    Yield a row for each number of targets and direction.

    :param other: The folder that has the other package ``ramblock`` in it.
    """
    context.say(CASE)
    keys = [(count, to) for count in TARGETS for to in ("shared", "private")]
    samples = {key: Samples() for key in keys}
    ratios: dict[tuple[int, str], list[float]] = {key: [] for key in keys}
    for index in range(context.choose(8, 40) + 1):
        own, others = take_turn(OWN_SOURCE), take_turn(other)
        if not index:
            continue  # it compiles what is not compiled yet
        for key in keys:
            samples[key].add(OWN, own.times[key], own.gauge)
            samples[key].add(OTHER, others.times[key], others.gauge)
            ratios[key].append(_best(others, key) / _best(own, key))
    for count, to in keys:
        low, _, high = quantiles(ratios[count, to], n=4)
        yield samples[count, to].row(
            CASE,
            {"targets": str(count), "to": to},
            facts={"by round, lower quartile": low, "upper quartile": high},
        )


def _best(turn: Turn, key: tuple[int, str]) -> float:
    return Summary.of(turn.times[key]).best
