# SPDX-License-Identifier: Apache-2.0
"""Counts and times of a run's conversions."""

from __future__ import annotations

from array import array
from collections import Counter
from enum import Enum

from ramblock.units import KIB, MIB

__all__ = ["Outcome", "Tally", "percentile"]


class Outcome(Enum):
    """How a request ended."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """All of it was in that state already."""
    REFUSED = "refused"
    """A request that cannot be valid."""
    OVER_BUDGET = "over budget"
    ROLLED_BACK = "rolled back"
    POISONED = "poisoned"


_CLASSES = ((4 * KIB, "4 KiB"), (64 * KIB, "to 64 KiB"), (2 * MIB, "to 2 MiB"))


def size_class(size: int) -> str:
    """Name the class of sizes that *size* belongs to."""
    return next((name for limit, name in _CLASSES if size <= limit), "larger")


def percentile(values: array[int], share: float) -> int:
    """Value below which *share* of the sorted *values* lie; they are not empty."""
    return values[min(int(len(values) * share), len(values) - 1)]


class Tally:
    """Counts of the requests' outcomes."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.by_class: Counter[tuple[str, Outcome]] = Counter()
        self.by_action: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.changed_bytes = 0
        self.map_calls = 0
        self.unmap_calls = 0
        self.pages_to_shared = 0
        self.pages_to_private = 0
        self.not_freed_bytes = 0
        #: Nanoseconds in convert(), without the verifier's share.
        self.conversion_ns = 0
        self._times: dict[str, array[int]] = {}

    @property
    def requests(self) -> int:
        """Requests so far."""
        return self.outcomes.total()

    def note(self, action: str, size: int, outcome: Outcome, nanoseconds: int) -> None:
        """Note one request."""
        name = size_class(size)
        self.outcomes[outcome] += 1
        self.by_class[name, outcome] += 1
        self.by_action[action] += 1
        self.conversion_ns += nanoseconds
        if outcome is Outcome.DONE:
            self._times.setdefault(name, array("q")).append(nanoseconds)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Latencies of conversions that changed something, in microseconds, by class of sizes."""
        result = {}
        for name in (*(name for _, name in _CLASSES), "larger"):
            times = self._times.get(name)
            if times:
                ordered = array("q", sorted(times))
                result[name] = {
                    "p50": percentile(ordered, 0.5) / 1000,
                    "p90": percentile(ordered, 0.9) / 1000,
                    "p99": percentile(ordered, 0.99) / 1000,
                    "max": ordered[-1] / 1000,
                }
        return result
