# SPDX-License-Identifier: Apache-2.0
"""The run's guest memory: notes the outcome of every request, from script or guest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter_ns

from ramblock.discard.attributes import PageState
from ramblock.errors import (
    ConversionError,
    DmaError,
    MappingLimitError,
    PoisonedError,
    RamblockError,
    UsageError,
)
from ramblock.guest.block import RamBlock
from ramblock.guest.conversion import ConversionResult
from ramblock.guest.memory import GuestMemory
from ramblock.guest.vm import Vm
from ramblock.hostmem.backing import PrivateBacking
from ramblock.run.guest_script import Action, Request
from ramblock.run.tally import Outcome, Tally
from ramblock.testing.verifier import Verifier
from ramblock.trace.writer import TraceWriter
from ramblock.units import PAGE_SIZE

__all__ = ["CountedMemory"]

_log = logging.getLogger(__name__)


class CountedMemory(GuestMemory):
    """
    A guest memory that counts.

    :param vm: As for any.
    :param verifier: Whose time is not a conversion's.
    :param trace: Gets a line for each request.
    """

    def __init__(self, vm: Vm, verifier: Verifier, trace: TraceWriter) -> None:
        super().__init__(vm)
        self.tally = Tally()
        #: Most mappings at once, all devices together.
        self.peak_entries = 0
        #: Most pages shared at once.
        self.peak_shared_pages = 0
        #: Purpose of the next request; callers set it before they make the request.
        self.action = Action.HOSTILE
        #: How the latest request ended.
        self.outcome = Outcome.REFUSED
        self._verifier = verifier
        self._trace = trace

    def ask(self, request: Request) -> Outcome:
        """Make a request as the script, without a guest; raises nothing but an interrupt."""
        self.action = request.action
        try:
            if request.action is Action.REBOOT:
                self.reset()
            else:
                self.convert(request.gpa, request.size, request.to)
        except (UsageError, MappingLimitError, ConversionError, DmaError) as error:
            _log.debug("request refused: %s", error)  # it is counted
        return self.outcome

    def convert(self, gpa: int, size: int, to: PageState) -> ConversionResult:
        """Convert, and count; raises as its base does."""
        clock = _Clock(self._verifier)
        try:
            result = super().convert(gpa, size, to)
        except RamblockError as error:
            clock.stop()
            self.outcome, reason = _classify(error)
            self._note(gpa, size, to, reason, clock)
            raise
        clock.stop()
        self.outcome = Outcome.DONE if result.changed_bytes else Outcome.UNCHANGED
        self._count(result)
        self._note(gpa, size, to, "", clock)
        return result

    def reset(
        self, vm: Vm | None = None, private: Mapping[RamBlock, PrivateBacking] | None = None
    ) -> int:
        """Reset, and count; raises what it always raises."""
        clock = _Clock(self._verifier)
        self._verifier.resetting = True
        self.outcome = Outcome.ROLLED_BACK
        try:
            not_freed = super().reset(vm, private)
            self.outcome = Outcome.DONE
        except PoisonedError:
            self.outcome = Outcome.POISONED
            raise
        finally:
            self._verifier.resetting = False
            clock.stop()
            self.tally.note(self.action.value, 0, self.outcome, clock.own_ns)
            self._trace.emit("reset", result=self.outcome, took=clock.took_ns)
        # All that was shared is private.
        self.tally.pages_to_private = self.tally.pages_to_shared
        return not_freed

    def _note(self, gpa: int, size: int, to: PageState, reason: str, clock: _Clock) -> None:
        self.tally.note(self.action.value, max(size, 0), self.outcome, clock.own_ns)
        if reason:
            self.tally.reasons[reason] += 1
        if self._trace.active:
            self._trace.emit(
                "conversion",
                gpa=_encodable(gpa),
                size=_encodable(size),
                to=to,
                action=self.action,
                result=self.outcome,
                took=clock.took_ns,
                **({"reason": reason} if reason else {}),
            )

    def _count(self, result: ConversionResult) -> None:
        tally = self.tally
        tally.changed_bytes += result.changed_bytes
        tally.map_calls += result.map_calls
        tally.unmap_calls += result.unmap_calls
        if result.to is PageState.SHARED:
            tally.pages_to_shared += result.changed_bytes // PAGE_SIZE
        else:
            tally.pages_to_private += result.changed_bytes // PAGE_SIZE
        shared_now = tally.pages_to_shared - tally.pages_to_private
        self.peak_shared_pages = max(self.peak_shared_pages, shared_now)
        self.peak_entries = max(self.peak_entries, sum(mapper.entries for mapper in self.mappers))


class _Clock:
    """Times one conversion, with and without the verifier's time in this thread."""

    __slots__ = ("_began", "_verifier", "_watching", "own_ns", "took_ns")

    def __init__(self, verifier: Verifier) -> None:
        self.took_ns = self.own_ns = 0
        self._verifier = verifier
        self._watching = verifier.spent_here_ns()
        self._began = perf_counter_ns()

    def stop(self) -> None:
        self.took_ns = perf_counter_ns() - self._began
        watching = self._verifier.spent_here_ns() - self._watching
        self.own_ns = max(self.took_ns - watching, 0)


def _classify(error: RamblockError) -> tuple[Outcome, str]:
    """Return the outcome to count for a failed conversion, and the cause in a few words."""
    if isinstance(error, PoisonedError):
        return Outcome.POISONED, str(error)
    if isinstance(error, ConversionError):
        return Outcome.ROLLED_BACK, f"step {error.step!r} failed: {error.__cause__}"
    if isinstance(error, MappingLimitError):
        return Outcome.OVER_BUDGET, f"the budget of {error.limit} mappings is used up"
    if isinstance(error, UsageError):
        return Outcome.REFUSED, _USAGE_REASONS.get(error.reason or "", str(error))
    raise error


_USAGE_REASONS = {
    "hole": "a hole",
    "no private side": "RAM without private backing",
    "alignment": "not aligned to pages",
    "limit": "past the end of the address space",
    "empty": "empty, or a negative address",
}


def _encodable(value: int) -> int | str:
    """Write a number as JSON readers take it; hostile ones do not fit into 64 bits."""
    return value if 0 <= value < 1 << 64 else hex(value)
