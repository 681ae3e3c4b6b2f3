# SPDX-License-Identifier: Apache-2.0
"""How far a run is."""

from __future__ import annotations

from ramblock.cli.progress import Progress
from ramblock.run.tally import Outcome, Tally

__all__ = ["RunProgress"]


class RunProgress(Progress):
    """Requests, their rate, and violations."""

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Show them, if it is time."""

        def line(seconds: float) -> str:
            of = "" if total is None else f" of {total:,}"
            text = f"{done:,}{of} requests, {done / seconds:,.0f}/s, {violations:,} violations"
            refused = tally.outcomes[Outcome.ROLLED_BACK] + tally.outcomes[Outcome.OVER_BUDGET]
            return f"{text} ({refused:,} put back)" if refused else text

        self.show(line, done, total)
