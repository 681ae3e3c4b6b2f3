# SPDX-License-Identifier: Apache-2.0
"""Findings put together for people: neighbours in one row, and a storm in one row with a count."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.result import rank
from ramblock.units import PAGE_SIZE

__all__ = ["FindingGroup", "group_faults", "group_neighbours", "group_notes"]


class FindingGroup(NamedTuple):
    """Findings that are shown as one; at least one."""

    findings: Sequence[Finding]

    @property
    def first(self) -> Finding:
        """The first, by address or by time, as they were grouped."""
        return self.findings[0]

    @property
    def number(self) -> int:
        """How many events they stand for."""
        return sum(finding.count for finding in self.findings)

    @property
    def start(self) -> int:
        """The lowest address."""
        return min(finding.start for finding in self.findings)

    @property
    def end(self) -> int:
        """The end of the highest."""
        return max(finding.end for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The worst of them."""
        return min(self.findings, key=rank)

    @property
    def grace(self) -> bool:
        """Whether a longer grace would clear all of them."""
        return all(finding.grace for finding in self.findings)


def group_neighbours(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Group those of one kind and target that lie side by side and ended together; worst first."""
    groups: list[list[Finding]] = []
    for finding in sorted(findings, key=_neighbourhood):
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.end == finding.start
            and _neighbourhood(last)[:-1] == _neighbourhood(finding)[:-1]
        ):
            groups[-1].append(finding)
        else:
            groups.append([finding])
    return sorted(map(FindingGroup, groups), key=lambda each: rank(each.worst))


def _neighbourhood(finding: Finding) -> tuple[str, str, str, str, bool, int]:
    # A window belongs to the event that closed it; a broken rule has no end, and belongs to nothing
    # but its own event.
    ended = str(finding.closed or ("" if finding.open else finding.opened))
    place = finding.target or ""
    return finding.kind, place, ended, finding.note, finding.grace, finding.start


def group_notes(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Group all but faults by kind, target and remark: a storm of notes is one; the first first."""
    return _group(
        (finding for finding in findings if finding.kind is not FindingKind.FAULT),
        lambda finding: (finding.kind, finding.target, finding.note),
    )


def group_faults(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Group faults by device and page; the first first."""
    return _group(
        (finding for finding in findings if finding.kind is FindingKind.FAULT),
        lambda finding: (finding.device, finding.target, finding.start // PAGE_SIZE),
    )


def _group(findings: Iterable[Finding], key: Callable[[Finding], Hashable]) -> list[FindingGroup]:
    groups: dict[Hashable, list[Finding]] = {}
    for finding in sorted(findings, key=_begin):
        groups.setdefault(key(finding), []).append(finding)
    return [FindingGroup(group) for group in groups.values()]


def _begin(finding: Finding) -> tuple[int, int, int]:
    return finding.since or 0, finding.opened.line, finding.start
