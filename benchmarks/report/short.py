# SPDX-License-Identifier: Apache-2.0
"""The few numbers that say what the benchmarks are about, for the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cases import checkerboard, convert, replay, startup, state_change
from harness.ours import OURS
from ramblock.units import GIB, KIB, MIB, TIB, format_size
from report.results import Results

__all__ = ["BASELINES", "ShortRow", "short_rows"]

BASELINES = ("C bitmap", "C bytes")


class ShortRow(NamedTuple):
    """One line: best deciles in nanoseconds by contender; None where there is none."""

    what: str
    values: dict[str, float | None]


def short_rows(results: Results) -> Iterator[ShortRow]:
    """Yield the lines for which something was measured."""
    contenders = (OURS, *BASELINES)

    def both_ways(size: int, vm_size: int) -> dict[str, float | None]:
        return {name: results.conversion(size, vm_size, name) for name in contenders}

    def figures(case: str, **parameters: str) -> dict[str, float | None]:
        return {name: results.figure(case, parameters, name) for name in contenders}

    rows = [
        *(
            ShortRow(
                f"convert {format_size(4 * KIB)}, guest of {format_size(vm_size)}",
                both_ways(4 * KIB, vm_size),
            )
            for vm_size in state_change.VM_SIZES
        ),
        *(
            ShortRow(f"convert {format_size(size)}, guest of 1 TiB", both_ways(size, TIB))
            for size in (2 * MIB, GIB)
        ),
        ShortRow("1 GiB checkerboard to private", figures(checkerboard.CASE, to="private")),
        ShortRow("1 GiB checkerboard to shared", figures(checkerboard.CASE, to="shared")),
        ShortRow("new listener, 16 TiB, ten runs", figures(replay.CASE, shared=replay.TEN_RUNS)),
        *(
            ShortRow(
                f"`GuestMemory.convert`, 4 KiB to {to}, one target",
                {
                    OURS: results.figure(
                        convert.TARGETS_CASE, {"size": "4 KiB", "to": to}, "1 target"
                    )
                },
            )
            for to in ("shared", "private")
        ),
        ShortRow("`import ramblock`", {OURS: figures(startup.CASE, what=startup.IMPORT)[OURS]}),
        ShortRow("`ramblock --help`", {OURS: figures(startup.CASE, what=startup.HELP)[OURS]}),
    ]
    for row in rows:
        if any(value is not None for value in row.values.values()):
            yield row
