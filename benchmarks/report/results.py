# SPDX-License-Identifier: Apache-2.0
"""All rows of a run, and how the promises and the short table find what they need among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cases import state_change
from harness.requests import Pattern
from harness.rows import Row
from ramblock.units import format_size

__all__ = ["Results"]


class Results:
    """The rows of a run, in the order in which they were measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    def cases(self) -> Iterator[tuple[str, list[Row]]]:
        """Yield each table's title and rows."""
        for case in dict.fromkeys(row.case for row in self.rows):
            yield case, [row for row in self.rows if row.case == case]

    def find(self, case: str, parameters: dict[str, str]) -> Row | None:
        """Find the row of *case* with these parameters; None: it was not measured."""
        return next(
            (
                row
                for row in self.rows
                if row.case == case and parameters.items() <= row.parameters.items()
            ),
            None,
        )

    def figure(self, case: str, parameters: dict[str, str], contender: str) -> float | None:
        """Find a best decile; None: it was not measured."""
        row = self.find(case, parameters)
        if row is None or contender not in row.results:
            return None
        return row.results[contender].best

    def fact(self, case: str, parameters: dict[str, str], name: str) -> float | None:
        """Find a fact; None: it was not measured."""
        row = self.find(case, parameters)
        return None if row is None else row.facts.get(name)

    def both_ways(self, case: str, parameters: dict[str, str], contender: str) -> float | None:
        """Find the mean of there and back: half the sum of the best deciles of both directions."""
        figures = [
            self.figure(case, {**parameters, "to": to}, contender) for to in ("shared", "private")
        ]
        known = [value for value in figures if value is not None]
        return sum(known) / 2 if len(known) == 2 else None

    def conversion(self, size: int, vm_size: int, contender: str) -> float | None:
        """Find the time of a state change, both ways, where nothing else is shared."""
        where = {
            "size": format_size(size),
            "VM": format_size(vm_size),
            "else shared": Pattern.NOTHING.value,
        }
        return self.both_ways(state_change.CASE, where, contender)
