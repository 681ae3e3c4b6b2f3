# SPDX-License-Identifier: Apache-2.0
"""A plan from a recording: its conversions, replayed through the real mapper under each policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ramblock.check.input import open_input
from ramblock.check.readers import ReaderOptions, Recording
from ramblock.errors import TraceError
from ramblock.plan.limits import Limits
from ramblock.plan.recorded import Observed, Recorded
from ramblock.plan.row import Verdict
from ramblock.plan.simulation import Counts, Place, Simulated, Simulation, kind_of
from ramblock.plan.targets import POLICIES, TARGETS
from ramblock.units import GIB, format_size

__all__ = ["TracePlan", "TraceRow", "plan_trace"]

# Bytes, every conversion counted; above it calls for single pages are counted and not made.
_MOST_MAPPED = 16 * GIB


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """The needs of one policy on one target for the trace's conversions."""

    policy: str
    target: str
    verdict: Verdict
    limit: int | None
    counts: Counts | None
    """None: impossible."""
    why: str = ""


class TracePlan(msgspec.Struct, kw_only=True):
    """The plan of a recording."""

    source: str
    rows: list[TraceRow]
    observed: list[Observed]
    """The calls of the recorded program, by target."""
    simulated: Simulated
    seconds: float
    """From the first event to the last conversion; 0: the trace has no times."""
    notes: list[str]
    """Gaps of the trace, in sentences."""

    @property
    def cannot_tell(self) -> str | None:
        """Why there is nothing to plan from; None: there is something."""
        if self.simulated.peak_shared:
            return None
        return "no memory is shared in this recording, so there is nothing to plan from"

    @property
    def hopeless(self) -> bool:
        """Whether none of the rows could have worked."""
        return all(each.verdict in (Verdict.REFUSED, Verdict.IMPOSSIBLE) for each in self.rows)


def plan_trace(
    path: str,
    limits: Limits,
    options: ReaderOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> TracePlan:
    """
    Plan from a recording.

    :param path: Anything that ``ramblock check`` reads; ``-`` is standard input.
    :param progress: Called with the number of events or conversions since the last call.
    :raises TraceError: It cannot be read to its end.
    """
    recorded = Recorded()
    with open_input(path) as stream:
        recording = Recording(path, stream, options or ReaderOptions())
        for events in recording.batches():
            recorded.feed(events)
            if progress is not None:
                progress(len(events))
    if recording.error is not None:
        raise recording.error
    places = recorded.places()
    with _make_simulation(path, recorded, places) as simulation:
        simulation.end_boot()
        left_out = _LeftOut()
        seconds = _replay(recorded, simulation, left_out, progress)
        simulated = simulation.result()
    return TracePlan(
        source=path,
        rows=_rows(simulated, limits),
        observed=recorded.observed,
        simulated=simulated,
        seconds=seconds,
        notes=_notes(recorded, left_out),
    )


def _is_much(recorded: Recorded, places: Sequence[Place]) -> bool:
    """Whether one call for each page would take minutes."""
    size = sum(place.size for place in places if not place.confidential)
    for start, end in recorded.steps.ranges():
        size += end - start
        if size > _MOST_MAPPED:
            return True
    return size > _MOST_MAPPED


def _make_simulation(path: str, recorded: Recorded, places: Sequence[Place]) -> Simulation:
    try:
        return Simulation(places, count_pages=_is_much(recorded, places))
    except OSError as error:
        size = sum(place.size for place in places)
        raise TraceError(
            f"{path}: a guest with memory of {format_size(size)} cannot be laid out here:"
            f" {error.strerror}",
            path=path,
            line=0,
        ) from error


class _LeftOut(msgspec.Struct):
    """Conversions that are not replayed."""

    elsewhere: int = 0
    """Not in memory that the trace tells of."""
    ends: int = 0
    """Taken for the end of a block."""


def _replay(
    recorded: Recorded,
    simulation: Simulation,
    left_out: _LeftOut,
    progress: Callable[[int], None] | None,
) -> float:
    time = 0.0
    for number, (time, request) in enumerate(recorded.steps):
        if recorded.ends(request):
            left_out.ends += 1
        elif simulation.covers(request):
            simulation.convert(request)
            simulation.note(time)
        else:
            left_out.elsewhere += 1
        if progress is not None and not number % 500:
            progress(500)
    return time


def _rows(simulated: Simulated, limits: Limits) -> list[TraceRow]:
    rows = []
    for target in TARGETS:
        for policy in POLICIES:
            limit = target.max_mappings(limits)
            if not target.can(policy):
                rows.append(
                    TraceRow(
                        policy=policy.value,
                        target=target.name,
                        verdict=Verdict.IMPOSSIBLE,
                        limit=limit,
                        counts=None,
                        why=f"{target.name} cannot cut",
                    )
                )
                continue
            counts = simulated.final[kind_of(target, policy)]
            fits = limit is None or counts.peak_entries <= limit
            rows.append(
                TraceRow(
                    policy=policy.value,
                    target=target.name,
                    verdict=Verdict.FITS if fits else Verdict.REFUSED,
                    limit=limit,
                    counts=counts,
                    why="" if fits else f"{counts.peak_entries:,} mappings, limit {limit:,}",
                )
            )
    return rows


def _notes(recorded: Recorded, left_out: _LeftOut) -> list[str]:
    notes = []
    if recorded.from_mappings:
        notes.append(
            "the trace has no page states: pages that its busiest target maps are taken for shared,"
            " each map call for one run"
        )
    if recorded.unplaced:
        notes.append(
            f"{recorded.unplaced:,} changes of page states are left out:"
            " the trace does not tell where their block is"
        )
    if not recorded.told_layout:
        notes.append(
            "the trace does not tell where the guest has memory, so it may begin in the middle:"
            " memory shared before is not in it"
        )
    if left_out.ends:
        notes.append(
            f"{left_out.ends:,} requests that share all of a block at once are taken for its end,"
            " and left out"
        )
    if left_out.elsewhere:
        notes.append(
            f"{left_out.elsewhere:,} conversions are left out: they are not in one piece of memory"
            " that the trace tells of"
        )
    return notes
