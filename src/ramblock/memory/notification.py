# SPDX-License-Identifier: Apache-2.0
"""
Telling listeners of one change, and taking it back.

A :class:`Change` says what one source changes: a span of the block and the runs in it. A :class:`Notification` joins it
with the other sources (a range counts only where all of them say populated), clips it to each listener's section, and
tells the listeners one after the other, each its runs in ascending order. It notes how far it got before each call, so
that :meth:`Notification.take_back` undoes exactly what was told, whether a listener refused or Ctrl-C came in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from ramblock.memory.protocols import Budget, BudgetedListener, Listener, Source
from ramblock.memory.runs import Runs, intersect, merge_adjacent
from ramblock.memory.section import RamSection

if TYPE_CHECKING:
    from ramblock.memory.discard_manager import RamDiscardManager

__all__ = ["Change", "Notification", "Registration", "reserve"]


class Registration(NamedTuple):
    """A listener, its section, and what it can do beyond the two verbs."""

    listener: Listener
    section: RamSection
    sparse: bool
    budgeted: BudgetedListener | None

    @classmethod
    def of(cls, listener: Listener, section: RamSection) -> Registration:
        """Find out what *listener* can do."""
        budgeted = cast("BudgetedListener", listener) if hasattr(listener, "budget") else None
        return cls(listener, section, bool(getattr(listener, "sparse_discard", False)), budgeted)


class Change:
    """
    What one source changes.

    :param start: First byte that changes.
    :param end: First byte behind the last that changes.
    :param runs: The changing runs inside (start, end), ascending, as (start, end); None: all of the span changes. It may
        be asked as long as the change is not committed, and again after it was taken back.
    :param hollow: While the change is not in force, nothing in the span is populated (for a discard: once it is in
        force). Then one sparse discard may cover all of the span.
    """

    __slots__ = ("end", "hollow", "runs", "start")

    def __init__(
        self, start: int, end: int, runs: Callable[[int, int], Runs] | None, *, hollow: bool
    ) -> None:
        self.start = start
        self.end = end
        self.runs = runs
        self.hollow = hollow


class Notification:
    """
    One change of one block, told to its listeners; remembers how far it got.

    :param manager: The block's discard manager, locked by the caller.
    :param change: What changes.
    :param others: The sources that have to agree: all but the one that changes.
    :param populate: Whether the change populates or discards.
    :param only: Tell this one listener, registered or not; None: all that are registered.
    """

    __slots__ = (
        "_at",
        "_block",
        "_change",
        "_doubts_before",
        "_guard",
        "_in_flight",
        "_others",
        "_populate",
        "_refused",
        "_registrations",
        "_told",
        "refused_by",
    )

    def __init__(
        self,
        manager: RamDiscardManager,
        change: Change,
        others: Sequence[Source],
        *,
        populate: bool,
        only: Registration | None = None,
    ) -> None:
        self._block = block = manager.block
        self._guard = guard = block.guard
        self._registrations = manager.registrations if only is None else (only,)
        self._change = change
        self._others = others
        self._populate = populate
        self._told: list[Registration] = []
        self._at: Registration | None = None
        self._in_flight: RamSection | None = None
        self._refused = False
        #: The listener that refused, or the target it drives.
        self.refused_by: object = None
        self._doubts_before = guard.doubt_count

    def _runs(self, section: RamSection) -> Runs:
        change = self._change
        start, end = max(change.start, section.offset), min(change.end, section.end)
        if start >= end:
            return iter(())
        runs = iter(((start, end),)) if change.runs is None else change.runs(start, end)
        if not self._others:
            return runs
        for source in self._others:
            runs = intersect(runs, source)
        return merge_adjacent(runs)

    def _exact(self, section: RamSection) -> Iterable[RamSection]:
        """List the runs of the change in *section*; lazily where there can be many."""
        change = self._change
        if change.runs is None and not self._others:
            start, end = change.start, change.end
            if start >= section.offset and end <= section.end:
                return (section.part(start, end),)
            start, end = max(start, section.offset), min(end, section.end)
            return (section.part(start, end),) if start < end else ()
        return (section.part(start, end) for start, end in self._runs(section))

    def _discards(self, registration: Registration) -> Iterable[RamSection]:
        """List what a listener hears as discards: its runs, or one range around them."""
        section = registration.section
        if not (registration.sparse and self._change.hollow):
            return self._exact(section)
        first = next(self._runs(section), None)
        return (
            () if first is None else (section.part(first[0], min(self._change.end, section.end)),)
        )

    def tell(self) -> None:
        """
        Tell every listener.

        :raises BaseException: Whatever a listener raised, or an interrupt. Call :meth:`take_back`.
        """
        populate = self._populate
        for registration in self._registrations:
            self._at = registration
            listener = registration.listener
            if populate:
                notify, sections = listener.notify_populate, self._exact(registration.section)
            else:
                notify, sections = listener.notify_discard, self._discards(registration)
            for section in sections:
                self._in_flight = section
                try:
                    notify(section)
                except BaseException as error:
                    # Ctrl-C inside a listener is not its answer: it may have done what it was told.
                    self._refused = isinstance(error, Exception)
                    self.refused_by = getattr(listener, "target", listener)
                    raise
            self._told.append(registration)
            self._at = self._in_flight = None

    def take_back(self) -> None:
        """
        Undo what :meth:`tell` did, latest listener first; those that heard nothing hear nothing now.

        A listener that raised holds what it held before that call. An interrupt (Ctrl-C before, in or after the call) is
        no answer: the call in flight may have been made, and is reversed too, run by run. Every listener is put back even
        if an earlier one fails to; each failure is noted as a doubt and poisons.

        :raises BaseException: The last failure, after all of them; a RuntimeError when it was in telling that a listener
            reported pages in doubt. Steps before this one must not be undone then: the pages may be reachable.
        """
        failure: BaseException | None = None
        current, in_flight = self._at, self._in_flight
        told_already = bool(self._told) and current is self._told[-1]
        unsettled = [
            entry for entry in self._registrations if entry.budgeted and entry.budgeted.unsettled
        ]
        for registration in unsettled:
            self._doubt_all(registration, "interrupted while it was put back")
        if current in unsettled:
            current = None
        if current is not None and in_flight is not None and not told_already:
            until = in_flight.offset if self._refused else in_flight.end
            failure = self._reverse(current, until)
        for registration in reversed(self._told):
            failure = self._reverse(registration, None) or failure
        self._told.clear()
        self._at = self._in_flight = None
        self._refused = False
        if failure is not None:
            raise failure
        change = self._change
        if self._guard.doubted_since(self._doubts_before, self._block, change.start, change.end):
            raise RuntimeError("a listener may still reach pages of this change")

    def doubt(self, reason: str) -> None:
        """Note what changes as in doubt for every listener, whatever it was told."""
        for registration in self._registrations:
            try:
                for section in self._exact(registration.section):
                    self._guard.doubt(section, registration.listener, reason)
            except BaseException:  # a source that does not answer; this is part of an undo
                self._doubt_all(registration, reason)

    def _doubt_all(self, registration: Registration, reason: str) -> None:
        """Note all that may change for one listener as in doubt."""
        section, change = registration.section, self._change
        start, end = max(change.start, section.offset), min(change.end, section.end)
        if start < end:
            self._guard.doubt(section.part(start, end), registration.listener, reason)

    def tell_regardless(self) -> None:
        """
        Tell the discard of everything to every listener, whatever they raise; what is refused is noted as in doubt.

        One with a budget lets go of all it holds, and a sparse one hears of its whole section: after a failure they may
        hold what is not populated any more.
        """
        for registration in self._registrations:
            section = registration.section
            if registration.budgeted is not None:
                registration.budgeted.let_go()
                continue
            for part in (section,) if registration.sparse else self._exact(section):
                try:
                    registration.listener.notify_discard(part)
                except Exception as error:  # closing goes on
                    self._guard.doubt(
                        part, registration.listener, f"could not be discarded: {error!r}"
                    )

    def _reverse(self, registration: Registration, until: int | None) -> BaseException | None:
        """Tell one listener the opposite of all runs that begin before *until*; None: of all."""
        failure: BaseException | None = None
        try:
            sections = (
                self._discards(registration)
                if self._populate and until is None
                else self._exact(registration.section)
            )
            for section in sections:
                if until is not None and section.offset >= until:
                    break
                failure = self._reverse_one(registration, section) or failure
        except (
            BaseException
        ) as error:  # a source that does not answer; the other listeners have to be put back too
            self._doubt_all(registration, f"a source could not be asked: {error!r}")
            failure = error
        return failure

    def _reverse_one(self, registration: Registration, section: RamSection) -> BaseException | None:
        listener = registration.listener
        try:
            if self._populate:
                listener.notify_discard(section)
            else:
                listener.notify_populate(section)
        except (
            BaseException
        ) as error:  # the other listeners must be put back whatever this one raises
            what = "discarded" if self._populate else "populated"
            self._guard.doubt(section, listener, f"could not be {what} again: {error!r}")
            return error
        return None

    def needs(self, total: dict[Budget, int]) -> None:
        """Add up the entries that the change needs, per budget, for its work and its undo."""
        for registration in self._registrations:
            listener = registration.budgeted
            if listener is None or listener.budget.limit is None:
                continue
            if self._populate:
                extra = listener.entries_to_populate(self._exact(registration.section))
            else:
                extra = sum(
                    listener.entries_to_discard(section) for section in self._discards(registration)
                )
            total[listener.budget] = total.get(listener.budget, 0) + extra


def reserve(notifications: Iterable[Notification]) -> None:
    """
    Check the budgets for a whole transaction: its work, and its undo.

    :raises MappingLimitError: One of them is too small. Nothing was told to anybody.
    """
    total: dict[Budget, int] = {}
    for notification in notifications:
        notification.needs(total)
    if total:
        for budget, extra in total.items():
            budget.require(extra)
