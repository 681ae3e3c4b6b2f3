# SPDX-License-Identifier: Apache-2.0
"""
Telling the listeners of one change, and taking it back.

A notification joins what one source changes with the other sources (a range counts only where all of
them say populated), clips it to each listener's section, and tells the listeners one after the other,
each its runs in ascending order. It notes how far it got before each call, so that
:meth:`Notification.take_back` undoes exactly what was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from ramblock.discard.guard import Guard
from ramblock.discard.listeners import Budget
from ramblock.discard.registry import Registration, Registry
from ramblock.discard.section import RamSection
from ramblock.discard.sources import Source, joint_runs
from ramblock.ranges import Runs, clip

__all__ = ["Board", "Notification", "reserve"]


class Board(Protocol):
    """What a notification needs to know of a block; its discard manager is one."""

    guard: Guard
    sources: tuple[Source, ...]
    registry: Registry


class Notification:
    """
    One change of one block.

    :param board: The block's, locked by the caller.
    :param start: First byte of the block that changes.
    :param end: First byte behind the last that changes.
    :param populate: Whether the change populates or discards.
    :param source: Whose change it is: the other sources have to agree; None: all of them.
    :param runs: What changes inside (start, end), ascending, as (start, end); None: all of the span.
        It is asked as long as the change is not committed, and again after it was taken back.
    :param hollow: Without the change (for a discard: with it) nothing in the span is populated. Then
        one sparse discard may cover all of the span.
    :param only: Tell this one, registered or not; None: all whose section meets the span.
    """

    # How many listeners were told everything, and the section that the next one is being told.
    _told = 0
    _in_flight: RamSection | None = None
    _refused = False
    #: The listener that refused, or the target it drives.
    refused_by: object = None

    def __init__(
        self,
        board: Board,
        start: int,
        end: int,
        *,
        populate: bool,
        source: Source | None = None,
        runs: Callable[[int, int], Runs] | None = None,
        hollow: bool = True,
        only: Registration | None = None,
    ) -> None:
        self._guard = guard = board.guard
        self._registrations = (
            board.registry.overlapping(start, end) if only is None else [only]
        )
        self._start = start
        self._end = end
        others = board.sources
        if source is not None:
            others = () if len(others) == 1 else tuple(o for o in others if o is not source)
        self._others = others
        self._populate = populate
        self._runs = runs
        self._hollow = hollow
        self._doubts_before = guard.doubt_count

    def _exact(self, section: RamSection) -> Iterable[RamSection]:
        """List the runs of the change in *section*; lazily where there can be many."""
        start, end = max(self._start, section.offset), min(self._end, section.offset + section.size)
        if start >= end:
            return ()
        if self._runs is None and not self._others:
            return (section.part(start, end),)
        # The one place through which every run goes: a source may think in larger granules than
        # the borders of a section, and its answer must not leave it.
        runs = iter(((start, end),)) if self._runs is None else clip(self._runs(start, end), start, end)
        return (section.part(start, end) for start, end in joint_runs(runs, self._others))

    def _discards(self, registration: Registration) -> Iterable[RamSection]:
        """List what a listener hears as discards: its runs, or one range around them."""
        section = registration.section
        exact = self._exact(section)
        if not (registration.sparse and self._hollow) or isinstance(exact, tuple):
            return exact
        first = next(iter(exact), None)
        return () if first is None else (section.part(first.offset, min(self._end, section.end)),)

    def tell(self) -> None:
        """
        Tell every listener.

        :raises BaseException: Whatever a listener, or a source that was asked, raised. Call
            :meth:`take_back`.
        """
        populate = self._populate
        for registration in self._registrations:
            listener = registration.listener
            notify = listener.notify_populate if populate else listener.notify_discard
            if self._runs is None and not self._others:
                # Nearly every conversion: one run, without a call to find that out.
                whole = registration.section
                start, end = max(self._start, whole.offset), min(self._end, whole.offset + whole.size)
                sections: Iterable[RamSection] = (whole.part(start, end),) if start < end else ()
            elif populate:
                sections = self._exact(registration.section)
            else:
                sections = self._discards(registration)
            for section in sections:
                self._in_flight = section
                try:
                    notify(section)
                except BaseException as error:
                    # An Exception is a refusal. Anything else came from somewhere else, and the
                    # listener may have done what it was told.
                    self._refused = isinstance(error, Exception)
                    self.refused_by = registration.target
                    raise
            self._told += 1
            self._in_flight = None

    def take_back(self) -> None:
        """
        Undo :meth:`tell`, latest listener first; those that heard nothing hear nothing now.

        A listener that refused holds what it held before that call; where it is not known whether
        the call was carried out, it is reversed too. Every listener is put back even if an earlier
        one fails to; each failure is noted as a doubt and poisons.

        :raises BaseException: The last failure, after all of them; a RuntimeError when it was in
            telling that a listener reported pages in doubt. Steps before this one must not be undone
            then: the pages may be reachable.
        """
        failure: BaseException | None = None
        at = self._in_flight
        if at is not None:
            until = at.offset if self._refused else at.offset + at.size
            failure = self._reverse(self._registrations[self._told], until)
        for registration in reversed(self._registrations[: self._told]):
            failure = self._reverse(registration, None) or failure
        self._told = 0
        self._in_flight = None
        self._refused = False
        if failure is not None:
            raise failure
        if self._guard.doubt_count > self._doubts_before and self._registrations:
            block = self._registrations[0].section.block
            if self._guard.doubted_since(self._doubts_before, block, self._start, self._end):
                raise RuntimeError("a listener may still reach pages of this change")

    def _reverse(self, registration: Registration, until: int | None) -> BaseException | None:
        """Tell one listener the opposite of all runs that begin before *until*; None: of all."""
        listener = registration.listener
        notify, verb = listener.notify_populate, "populated"
        if self._populate:
            notify, verb = listener.notify_discard, "discarded"
        failure: BaseException | None = None
        try:
            if self._populate and until is None:
                sections = self._discards(registration)
            else:
                sections = self._exact(registration.section)
            for section in sections:
                if until is not None and section.offset >= until:
                    break
                try:
                    notify(section)
                except BaseException as error:  # the others must be put back whatever this raises
                    self._guard.doubt(section, listener, f"could not be {verb} again: {error!r}")
                    failure = error
        except BaseException as error:  # a source that does not answer
            self._doubt_all(registration, f"a source could not be asked: {error!r}")
            failure = error
        return failure

    def tell_regardless(self) -> None:
        """
        Tell the discard to every listener, whatever they raise; a refusal is noted as a doubt.

        One with a budget lets go of all it holds, and a sparse one hears of its whole section: after
        a failure they may hold what is not populated any more.
        """
        for registration in self._registrations:
            section = registration.section
            if registration.budgeted is not None:
                registration.budgeted.let_go()
                continue
            for part in (section,) if registration.sparse else self._exact(section):
                try:
                    registration.listener.notify_discard(part)
                except BaseException as error:  # closing goes on
                    self._guard.doubt(
                        part, registration.listener, f"could not be discarded: {error!r}"
                    )

    def doubt(self, reason: str) -> None:
        """Note the change as in doubt for every listener, whatever it was told."""
        for registration in self._registrations:
            try:
                for section in self._exact(registration.section):
                    self._guard.doubt(section, registration.listener, reason)
            except BaseException:  # a source that does not answer; this is part of an undo
                self._doubt_all(registration, reason)

    def _doubt_all(self, registration: Registration, reason: str) -> None:
        section = registration.section.intersect(self._start, self._end - self._start)
        if section is not None:
            self._guard.doubt(section, registration.listener, reason)

    def needs(self, total: dict[Budget, int]) -> None:
        """Add up the entries that the change needs, per budget, for its work and its undo."""
        for registration in self._registrations:
            listener = registration.budgeted
            if listener is None or listener.mapper.limit is None:
                continue
            if self._populate:
                extra = listener.entries_to_populate(self._exact(registration.section))
            else:
                extra = sum(map(listener.entries_to_discard, self._discards(registration)))
            total[listener.mapper] = total.get(listener.mapper, 0) + extra


def reserve(notifications: Iterable[Notification]) -> None:
    """
    Check the budgets for a whole operation: its work, and its undo.

    :raises MappingLimitError: One of them is too small. Nothing was told to anybody.
    """
    total: dict[Budget, int] = {}
    for notification in notifications:
        notification.needs(total)
    for budget, extra in total.items():
        budget.require(extra)
