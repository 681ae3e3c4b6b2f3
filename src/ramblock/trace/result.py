# SPDX-License-Identifier: Apache-2.0
"""The result of an audit: findings, counts, and the trace's limits."""

from __future__ import annotations

from bisect import bisect_right

import msgspec

from ramblock.trace.findings import FAILURES, Finding, FindingKind

__all__ = ["AuditResult", "FindingLog", "KindCount", "Lengths", "TargetSummary", "rank"]

#: Findings of one kind that are kept whole; beyond it the worst are, and all are counted.
KEPT_OF_A_KIND = 10_000

_POWERS = [10**power for power in range(20)]
_ORDER = {kind: number for number, kind in enumerate(FindingKind)}


def rank(finding: Finding) -> tuple[int, float, int, int]:
    """Sort key: worst first; of one kind the longest, then the largest, then by address."""
    if finding.duration is not None:
        length = float(finding.duration)
    else:
        length = float("inf") if finding.open else 0.0
    return _ORDER[finding.kind], -length, -finding.size, finding.start


class Lengths(msgspec.Struct):
    """Lengths of windows, in nanoseconds."""

    count: int = 0
    total: int = 0
    longest: int = 0
    buckets: dict[int, int] = {}
    """
    How many were shorter than this power of ten, and not shorter than the one below.

    1 for zero.
    """

    def add(self, length: int) -> None:
        """Add one."""
        self.count += 1
        self.total += length
        if length > self.longest:
            self.longest = length
        place = bisect_right(_POWERS, length)
        bucket = _POWERS[place] if place < len(_POWERS) else 10 ** len(str(length))
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1


class KindCount(msgspec.Struct):
    """How often one kind was found."""

    count: int = 0
    """Windows, or broken rules."""
    open: int = 0
    """Still open at the end of the trace."""
    size: int = 0
    """Bytes in all of them."""
    longest: int = 0
    """Nanoseconds; of those that were closed."""
    kept: int = 0
    """How many are listed."""


class TargetSummary(msgspec.Struct):
    """One target."""

    name: str
    maps: int
    unmaps: int
    mapped_bytes: int
    """At the end of the trace, or before it was detached."""
    entries: int
    """Mappings, likewise."""


class AuditResult(msgspec.Struct, kw_only=True):
    """
    The result for one trace, or several that were merged.

    Times are nanoseconds of the trace's clock. ``began`` and ``ended`` are None where it has no
    times.
    """

    sources: list[str]
    events: int
    began: int | None
    ended: int | None
    counts: dict[FindingKind, KindCount]
    findings: list[Finding]
    """Worst first; see :data:`KEPT_OF_A_KIND`."""
    transitional: Lengths
    not_yet_mapped: Lengths
    """Shared and not mapped while their own conversion was going on: normal, and counted."""
    conversions: int
    targets: list[TargetSummary]
    limits: list[str]
    """The trace's limits, in sentences."""
    cannot_tell: list[str] = []
    """Why nothing could be judged, or not all that had to be, in sentences."""
    judged_bytes: int = 0
    """
    Bytes of pages that were mapped, or changed their state, while the other was known.

    Each time anew.
    """
    by_event: dict[str, int] = {}
    unknown_lines: int = 0
    unknown_examples: list[str] = []
    error: str | None = None
    """Why the trace could not be read to its end."""

    def failures(self, *, strict: bool = False) -> int:
        """How many findings make the audit fail."""
        return sum(count.count for kind, count in self.counts.items() if strict or kind in FAILURES)


class FindingLog:
    """Keeps the worst findings of each kind, and counts all."""

    def __init__(self) -> None:
        self.counts: dict[FindingKind, KindCount] = {}
        self._kept: dict[FindingKind, list[Finding]] = {}
        #: The length of the shortest that is kept, where some were dropped.
        self._shortest: dict[FindingKind, int] = {}

    def add(self, finding: Finding) -> None:
        """Add one."""
        count = self.counts.get(finding.kind)
        if count is None:
            count = self.counts[finding.kind] = KindCount()
            self._kept[finding.kind] = []
        count.count += 1
        count.open += finding.open
        count.size += finding.size
        duration = finding.duration
        if duration is not None and duration > count.longest:
            count.longest = duration
        kept = self._kept[finding.kind]
        kept.append(finding)
        if len(kept) >= 2 * KEPT_OF_A_KIND:
            kept.sort(key=rank)
            del kept[KEPT_OF_A_KIND:]
            self._shortest[finding.kind] = kept[-1].duration or 0

    def keeps(self, kind: FindingKind, duration: int) -> bool:
        """Whether a finding of this length would be kept; else :meth:`count` is enough."""
        shortest = self._shortest.get(kind)
        return shortest is None or duration > shortest

    def count(self, kind: FindingKind, size: int) -> None:
        """Count one that is not kept, shorter than others of its kind."""
        count = self.counts[kind]
        count.count += 1
        count.size += size

    def worst(self) -> list[Finding]:
        """Return those that were kept, worst first."""
        findings: list[Finding] = []
        for kind, kept in sorted(self._kept.items(), key=lambda item: _ORDER[item[0]]):
            kept.sort(key=rank)
            del kept[KEPT_OF_A_KIND:]
            self.counts[kind].kept = len(kept)
            findings += kept
        return findings
