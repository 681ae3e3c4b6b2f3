# SPDX-License-Identifier: Apache-2.0
"""
Telling the listeners of one change, and taking it back.

A notification joins the change of one source with the other sources (a range counts only where all
of them say populated), clips it to each listener's section, and tells the listeners one after the
other, each its runs in ascending order. It notes before each call how far it got, for the undo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ramblock.discard.guard import Guard
from ramblock.discard.listeners import Budget, Registration, Registry
from ramblock.discard.section import Block, RamSection
from ramblock.discard.sources import Source, joint_runs
from ramblock.errors import describe_error
from ramblock.ranges import Runs, clip


class Board(Protocol):
    """The side of a discard manager that a notification needs."""

    block: Block
    guard: Guard
    sources: tuple[Source, ...]
    registry: Registry


class Notification:
    """
    One change of one block.

    :param board: The block's, locked by the caller; bytes [start, end) of the block change.
    :param populate: Whether the change populates or discards.
    :param source: Whose change it is: the other sources have to agree; None: all of them.
    :param runs: Yields the changes inside (start, end), ascending; None: all of the span. It is
        asked as long as the change is not committed, and again after it was taken back.
    :param hollow: Without the change (for a discard: with it) nothing in the span is populated.
        Then one sparse discard may cover all of the span.
    :param only: Tell this one, registered or not; None: all whose section meets the span.
    """

    # Class defaults: a notification is made for each change, and most of them need no other value.
    _told = 0  # listeners that were told everything
    _in_flight: RamSection | None = None  # told to the next one, which has not answered
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
        self._board = board
        self._registrations = board.registry.overlapping(start, end) if only is None else [only]
        self._start = start
        self._end = end
        others = board.sources
        if source is not None:
            others = () if len(others) == 1 else tuple(o for o in others if o is not source)
        self._others = others
        self._populate = populate
        self._runs = runs
        self._hollow = hollow

    def _exact(self, section: RamSection) -> Iterable[RamSection]:
        # Comparisons: max() and min() are a tenth of a microsecond each.
        start, end = section.offset, section.offset + section.size
        start = start if start > self._start else self._start
        end = end if end < self._end else self._end
        if start >= end:
            return ()
        if self._runs is None and not self._others:
            return (section.part(start, end),)
        runs: Runs = iter(((start, end),))
        if self._runs is not None:
            # The one place through which every run goes: a source may think in larger granules than
            # the borders of a section, and its answer must not leave it.
            runs = clip(self._runs(start, end), start, end)
        # Lazily: there can be a million.
        return (section.part(start, end) for start, end in joint_runs(runs, self._others))

    def _heard(self, registration: Registration, *, populate: bool) -> Iterable[RamSection]:
        section = registration.section
        if registration.budgeted is not None and self._hollow and not populate:
            # A mapper unmaps by its own books, and is not told less: another source may have
            # discarded pages already and say so later, and until then they are mapped.
            whole = section.intersect(self._start, self._end - self._start)
            return () if whole is None else (whole,)
        exact = self._exact(section)
        sparse = registration.sparse and self._hollow and not populate
        if not sparse or isinstance(exact, tuple):
            return exact
        # One range around all of them: fewer calls for the target.
        first = next(iter(exact), None)
        return () if first is None else (section.part(first.offset, min(self._end, section.end)),)

    def tell(self) -> None:
        """Tell every listener; whatever one raises, or a source, calls for :meth:`take_back`."""
        populate = self._populate
        whole: RamSection | None = None
        sections: Iterable[RamSection] = ()
        for registration in self._registrations:
            listener = registration.listener
            notify = listener.notify_populate if populate else listener.notify_discard
            if self._runs is not None or self._others:
                sections = self._heard(registration, populate=populate)
            elif registration.section is not whole:
                # Nearly every conversion: one run, and the same one for each device.
                whole = registration.section
                sections = self._exact(whole)
            for section in sections:
                self._in_flight = section
                try:
                    notify(section)
                except BaseException as error:
                    # An Exception is a refusal. Anything else came from somewhere else, and the
                    # listener may have obeyed.
                    self._refused = isinstance(error, Exception)
                    self.refused_by = registration.target
                    raise
            self._told += 1
            self._in_flight = None

    def take_back(self) -> None:
        """
        Undo :meth:`tell`, latest listener first; those that heard nothing hear nothing now.

        A listener that refused holds as much as before that call; where it is not known whether
        the call was carried out, it is reversed too. Every listener is put back even if an earlier
        one fails to; each failure is noted as a doubt and poisons.

        :raises BaseException: The last failure, after all of them; a RuntimeError when it was in
            telling that a listener reported pages in doubt. Steps before this one must not be
            undone then: the pages may be reachable.
        """
        failure, at = None, self._in_flight
        if at is not None:
            until = at.offset if self._refused else at.end
            failure = self._reverse(self._registrations[self._told], until)
        for registration in reversed(self._registrations[: self._told]):
            failure = self._reverse(registration, None) or failure
        self._told = 0
        self._in_flight = None
        self._refused = False
        if failure is not None:
            raise failure
        # Doubts are of this operation, since a poisoned memory takes no change; but they may be
        # about other blocks.
        for section, _ in self._board.guard.doubts:
            ours = section.block is self._board.block
            if ours and section.offset < self._end and self._start < section.end:
                raise RuntimeError("a listener may still reach pages of this change")

    def _reverse(self, registration: Registration, until: int | None) -> BaseException | None:
        """Tell one listener the opposite of all runs that begin before *until*; None: of all."""
        listener = registration.listener
        notify, verb = listener.notify_populate, "populated"
        if self._populate:
            notify, verb = listener.notify_discard, "discarded"
        failure: BaseException | None = None
        try:
            # As exact as a populate, where one range around all runs would go on behind *until*.
            exact = until is not None or not self._populate
            for section in self._heard(registration, populate=exact):
                if until is not None and section.offset >= until:
                    break
                try:
                    notify(section)
                except BaseException as error:  # the others must be put back whatever this raises
                    reason = f"could not be {verb} again: {describe_error(error)}"
                    self._board.guard.doubt(section, listener, reason)
                    failure = error
        except BaseException as error:  # a source that does not answer
            self._doubt_all(registration, f"a source could not be asked: {describe_error(error)}")
            failure = error
        return failure

    def doubt(self, reason: str) -> None:
        """Note the change as in doubt for every listener, whatever it was told."""
        for registration in self._registrations:
            try:
                for section in self._exact(registration.section):
                    self._board.guard.doubt(section, registration.listener, reason)
            except BaseException:  # a source that does not answer; this is part of an undo
                self._doubt_all(registration, reason)

    def _doubt_all(self, registration: Registration, reason: str) -> None:
        section = registration.section.intersect(self._start, self._end - self._start)
        if section is not None:
            self._board.guard.doubt(section, registration.listener, reason)

    def needs(self) -> Iterator[tuple[Budget, int]]:
        """Count the entries that the change needs for its work and its undo, by budget."""
        for registration in self._registrations:
            listener = registration.budgeted
            if listener is None or listener.mapper.limit is None:
                continue
            sections = self._heard(registration, populate=self._populate)
            if self._populate:
                extra = listener.entries_to_populate(sections)
            else:
                extra = sum(map(listener.entries_to_discard, sections))
            yield listener.mapper, extra


def reserve(notifications: Iterable[Notification]) -> None:
    """Check all budgets for the work and the undo; ``MappingLimitError``: nobody was told."""
    total: Counter[Budget] = Counter()
    for notification in notifications:
        for budget, extra in notification.needs():
            total[budget] += extra
    for budget, extra in total.items():
        budget.require(extra)
