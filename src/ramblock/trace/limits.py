# SPDX-License-Identifier: Apache-2.0
"""
Limits of a trace as evidence.

A clean audit of a trace without unmaps is worth nothing, and has to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ramblock.trace.mappings import TargetState
from ramblock.trace.result import TargetSummary
from ramblock.units import format_size

__all__ = ["MOST_NAMES", "Evidence", "Names", "find_limits", "why_not_judged"]


#: Names, and targets, that are kept of a kind; of more there is only the number.
MOST_NAMES = 100
_MOST_LOST = 5


class Names:
    """Names that a trace has told, the first ones, and how many more there are."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._kept: dict[str, None] = {}
        self.more = 0

    def add(self, name: str) -> None:
        """Add one; the same again counts once, as long as it is kept."""
        if name in self._kept:
            return
        if len(self._kept) < self._most:
            self._kept[name] = None
        else:
            self.more += 1

    def sentences(self, text: str) -> list[str]:
        """Return a sentence for each, with its name in place of ``{}``, and one for the others."""
        sentences = [text.format(name) for name in self._kept]
        if self.more:
            sentences.append(f"and so at {self.more:,} more places")
        return sentences


@dataclass(slots=True)
class Evidence:
    """The content of the trace, in numbers."""

    events: int = 0
    conversions: int = 0
    attributes: int = 0
    state_changes: int = 0
    unplaced_states: int = 0
    maps: int = 0
    failed_maps: int = 0
    unmaps: int = 0
    regions: int = 0
    faults: int = 0
    judged_bytes: int = 0
    device_memory: int = 0
    viommu: bool = False
    not_compared: bool = False
    unplaced_discards: int = 0
    stateless_bytes: int = 0
    mapped_before: int = 0
    guessed_ends: int = 0
    unfinished: int = 0
    alike: Names = field(default_factory=Names)
    emptied: Names = field(default_factory=Names)
    lost: Names = field(default_factory=lambda: Names(_MOST_LOST))
    gone: list[TargetSummary] = field(default_factory=list)
    more_targets: int = 0

    def note_gone(self, summary: TargetSummary) -> None:
        """Keep the sum of a target that is gone, of the first ones."""
        if len(self.gone) < MOST_NAMES:
            self.gone.append(summary)
        else:
            self.more_targets += 1


def why_not_judged(evidence: Evidence, *, followed: bool, left: bool) -> list[str]:
    """
    Say why the trace is no evidence, in sentences; nothing, if it is.

    :param followed: There is a guest whose page states and mappings are both in the trace.
    :param left: More is mapped where the trace ends than the memory of devices.
    """
    reasons = []
    has_states = bool(evidence.attributes or evidence.state_changes)
    if not evidence.events:
        reasons.append("no event was read")
    elif evidence.viommu:
        pass  # a limit says so
    elif not evidence.maps:
        if has_states or not evidence.faults:
            reasons.append("no mappings are in this trace")
    elif not followed and (left or has_states):
        if not has_states:
            reasons.append(
                "no page states are in this trace: which pages were private is not known"
            )
        elif evidence.unplaced_states:
            reasons.append("the places of page states are not known (--layout)")
        else:
            reasons.append("page states and mappings are those of different processes")
    if evidence.not_compared:
        reasons.append("there were more targets, or guests, at the same time than are compared")
    return reasons


def find_limits(evidence: Evidence, targets: Sequence[TargetState], *, timed: bool) -> list[str]:
    """List the trace's limits, in sentences."""
    limits = list(_about_mappings(evidence, targets))
    limits += _about_states(evidence)
    if evidence.viommu:
        limits.append(
            "the guest has an IOMMU of its own, so IOVAs are not guest addresses:"
            " mappings and page states were not compared"
        )
    if not timed:
        limits.append(
            "the trace has no times: how long windows were open is not known,"
            " and a conversion is taken for over when the next begins"
        )
    elif evidence.guessed_ends:
        limits.append(
            f"the end of {evidence.guessed_ends:,} conversions is not in the trace;"
            " each was taken for over when nothing of it was seen for the grace time (--grace)"
        )
    if evidence.unfinished:
        limits.append(
            f"{evidence.unfinished:,} windows were open at the end of the trace,"
            " in conversions that were going on"
        )
    limits += evidence.lost.sentences("events were lost ({}): their content is not known")
    if evidence.more_targets:
        limits.append(f"{evidence.more_targets:,} more targets are not listed")
    return limits


def _about_mappings(evidence: Evidence, targets: Sequence[TargetState]) -> list[str]:
    limits = []
    if not evidence.maps:
        limits.append(
            "no map events in this trace: neither stale nor missing mappings can be found"
        )
    elif not evidence.unmaps:
        limits.append("no unmap events in this trace: stale mappings cannot be ruled out")
    if evidence.regions:
        limits.append(
            "no maps are told, as by QEMU's type1: RAM that it adds wholly, and pages that it says"
            " became populated, are taken for mapped"
        )
    limits += evidence.alike.sentences(
        "{}: several devices, which the trace does not tell apart: a mapping that one of them"
        " lacks, or keeps, is not seen where the others have it"
    )
    if evidence.failed_maps:
        limits.append(f"maps that failed, {evidence.failed_maps:,} of them, count as never made")
    if evidence.mapped_before:
        limits.append(
            f"{format_size(evidence.mapped_before)} were unmapped that were mapped before the trace"
            " began: the mappings of then are not known"
        )
    limits += evidence.emptied.sentences(
        "{}: everything was unmapped while pages were shared, which is taken for its end"
    )
    untold = [target for target in targets if target.untold]
    limits += [_about_untold(target) for target in untold[:MOST_NAMES]]
    return limits


def _about_untold(target: TargetState) -> str:
    text = (
        f"{target.label}: {target.untold:,} unmaps were taken as done,"
        " because the trace does not tell their result"
        " (QEMU traces them when they are asked for, and frees the memory when they fail)"
    )
    if target.untold_inexact:
        text += (
            f"; {target.untold_inexact:,} of them did not name one mapping exactly and covered"
            f" {target.untold_mappings:,} mappings, which a server with libvfio-user's rule keeps:"
            " stale mappings cannot be ruled out (--unmap exact shows them;"
            " `ramblock probe --trace` records the server's side)"
        )
    return text


def _about_states(evidence: Evidence) -> list[str]:
    limits = []
    if not (evidence.attributes or evidence.state_changes or evidence.conversions):
        limits.append(
            "no conversions or page attributes in this trace: which pages were private is not"
            " known, so only broken rules can be found"
        )
    elif evidence.stateless_bytes:
        limits.append(
            f"{format_size(evidence.stateless_bytes)} were mapped of pages whose state the trace"
            " had not told: ordinary RAM, or converted before it began"
        )
    if evidence.unplaced_states:
        limits.append(
            f"{evidence.unplaced_states:,} state changes are relative to a block whose place is not"
            " known (--layout)"
        )
    if evidence.unplaced_discards:
        limits.append(
            f"{evidence.unplaced_discards:,} discards are of host addresses whose place in the"
            " guest is not known:"
            " memory that was freed while mapped is not found there"
        )
    return limits
