# SPDX-License-Identifier: Apache-2.0
"""Rows of the tables, and the samples that they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.gauge import read_gauge
from harness.measure import Summary

__all__ = ["CPU", "WALL", "Row", "Samples"]

CPU, WALL = "CPU time", "wall clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: what was done, and what each contender needed for it."""

    case: str
    """The table."""
    parameters: dict[str, str]
    """By column, for instance ``{"size": "4 KiB", "to": "shared"}``."""
    results: dict[str, Summary]
    """By contender, ours first."""
    facts: dict[str, float] = field(default_factory=dict)
    """What is no sample: calls, bytes, a longest time. The name of the column says the unit."""
    unit: str = "ns"
    """``ns``, or ``/s`` for a rate."""
    clock: str = CPU
    """Of the results: :data:`CPU` or :data:`WALL`."""
    gauge: Summary
    """What the gauge said in the same rounds; CPU time in nanoseconds, whatever the row counts."""
    note: str = ""
    """Why the first contender is slower than another, should it be."""


class Samples:
    """The samples of one row while it is measured, by contender."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}
        self._gauge: list[float] = []

    def add(
        self, contender: str, times: Iterable[float], gauge: Iterable[float] | None = None
    ) -> None:
        """
        Note what a turn of *contender* gave, and read the gauge.

        :param gauge: What it said where the turn was, should that be another process.
        """
        self._times.setdefault(contender, []).extend(times)
        self._gauge.extend([read_gauge()] if gauge is None else gauge)

    def row(
        self,
        case: str,
        parameters: dict[str, str],
        *,
        facts: dict[str, float] | None = None,
        unit: str = "ns",
        clock: str = CPU,
        note: str = "",
    ) -> Row:
        """Sum up; each contender has at least one sample."""
        return Row(
            case=case,
            parameters=parameters,
            results={
                name: Summary.of(times, rates=unit != "ns") for name, times in self._times.items()
            },
            facts=facts or {},
            unit=unit,
            clock=clock,
            gauge=Summary.of(self._gauge),
            note=note,
        )
