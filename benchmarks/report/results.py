# SPDX-License-Identifier: Apache-2.0
"""All rows of a run, and how the promises and the short table find what they need among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cases import state_change
from harness.measure import Row
from harness.requests import Pattern
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

    def median(self, case: str, parameters: dict[str, str], contender: str) -> float | None:
        """Find a median; None: it was not measured."""
        row = self.find(case, parameters)
        if row is None or contender not in row.results:
            return None
        return row.results[contender].median

    def conversion(self, size: int, vm_size: int, contender: str) -> float | None:
        """
        Find what a conversion of *size* bytes takes in a guest of *vm_size* where nothing else is shared.

        On average, when it goes there and back: half the sum of the medians of both directions.
        """
        where = {
            "size": format_size(size),
            "VM": format_size(vm_size),
            "else shared": Pattern.NOTHING.value,
        }
        medians = [
            self.median(state_change.CASE, {**where, "to": to}, contender)
            for to in ("shared", "private")
        ]
        known = [value for value in medians if value is not None]
        return sum(known) / 2 if len(known) == 2 else None
