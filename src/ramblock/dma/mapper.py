# SPDX-License-Identifier: Apache-2.0
"""
Keeps the mappings of one DMA target in step with what is populated (QEMU: hw/vfio/listener.c).

Theory of operation. The mapper is a listener of the discard manager of every section, here IOVA = GPA.
For each section it keeps two bits per page, taking memory only where something is mapped: *mapped*, and
*start*, set on the first page of each mapping. No more is needed: the number of set starts is the
number of entries, cutting out a range clears its bits and sets the start behind it, and a target that
wants whole mappings back gets the pieces between starts::

    page     0 1 2 3 4 5 6 7            0 1 2 3 4 5 6 7
    mapped   . # # # # # # .   cut 3    . # # . # # # .
    start    . # . . . . . .            . # . . # . . .

After a failure. A call of ours that raises leaves the target and the two bitmaps as before the call, or
it has reported the pages as in doubt. The target's own word is not enough for that: the bytes that an
unmap returns are checked against the bytes that were mapped; and after an exception that is no refusal
the call may or may not have been carried out, so the mapper makes sure before it goes on.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.discard.section import RamSection
from ramblock.dma.target import DmaTarget, HostRange, MappingPolicy
from ramblock.errors import DmaError, MappingLimitError, UsageError, describe_range
from ramblock.logs import Sparingly
from ramblock.units import PAGE_SIZE

__all__ = ["Mapper", "SectionMapper"]

_log = logging.getLogger(__name__)

#: Reports pages that a target may or may not still reach: section, listener, reason.
Doubt = Callable[[RamSection, object, str], None]

# An operator should hear of a budget before it refuses something; the share is ours.
_NEARLY_USED_UP = 0.9


def _effective_policy(target: DmaTarget, policy: MappingPolicy) -> MappingPolicy:
    if not isinstance(policy, MappingPolicy):
        raise UsageError(
            f"{policy!r} is not a mapping policy", value=policy, expected="PAGE, RUN or AUTO"
        )
    cuts = target.capabilities.cut and not target.capabilities.exact
    if policy is MappingPolicy.RUN and not cuts:
        raise UsageError(
            f"policy RUN needs a target that cuts, {target!r} cannot",
            value=policy,
            expected="PAGE or AUTO",
        )
    if policy is MappingPolicy.AUTO:
        return MappingPolicy.RUN if cuts else MappingPolicy.PAGE
    return policy


class Mapper:
    """
    One target's mappings. Made by ``GuestMemory.attach``.

    :param policy: PAGE, RUN or AUTO.
    :param max_mappings: The operator's budget; the smaller of it and the target's counts.
    :raises UsageError: RUN, and the target cannot cut.
    """

    def __init__(self, target: DmaTarget, policy: MappingPolicy, max_mappings: int | None) -> None:
        capabilities = target.capabilities
        limits = [limit for limit in (max_mappings, capabilities.max_mappings) if limit is not None]
        self.target = target
        self.policy = _effective_policy(target, policy)
        #: How many mappings may exist at once; None: any number.
        self.limit = min(limits, default=None)
        #: Smallest piece that one mapping covers, in bytes.
        self.page_size = max(capabilities.page_size, PAGE_SIZE)
        self.exact = capabilities.exact
        #: Mappings that exist now.
        self.entries = 0
        #: Bytes that devices can reach now.
        self.mapped_bytes = 0
        #: Calls made so far, those of undone conversions too.
        self.map_calls = 0
        self.unmap_calls = 0
        self.listeners: list[SectionMapper] = []
        self._warned = False
        self._log_refusal = Sparingly(_log)
        self._log_nearly = Sparingly(_log)

    def require(self, extra: int) -> None:
        """
        Check that *extra* entries more may exist at once.

        :raises MappingLimitError: They may not.
        """
        limit = self.limit
        if limit is None or extra <= 0:
            return
        needed = self.entries + extra
        if needed > limit:
            self._log_refusal(
                "refused: %d mappings needed, limit %d, target %r", needed, limit, self.target
            )
            raise MappingLimitError(
                f"{needed} mappings needed, {self.entries} in use, limit {limit}",
                limit=limit,
                needed=needed,
            )
        nearly = needed >= limit * _NEARLY_USED_UP
        if nearly and not self._warned:
            self._log_nearly(
                "%d of %d mappings will be in use on target %r", needed, limit, self.target
            )
        self._warned = nearly

    def check_section(self, section: RamSection, granularity: int | None) -> None:
        """
        Check that the target can map any granule of *section*.

        :param granularity: What can change of it, in bytes; None: nothing, the block has no sources.
        :raises UsageError: Page size above *granularity*, misaligned, or outside the target's IOVA ranges.
        """
        unit = self.page_size
        if granularity is not None and granularity < unit:
            raise UsageError(
                f"the target maps pages of {unit:#x} bytes, {section!r} changes by {granularity:#x}",
                value=unit,
                expected=f"at most {granularity:#x}",
            )
        if (section.gpa | section.offset | section.size) % unit:
            raise UsageError(f"{section!r} is not made of pages of {unit:#x} bytes", value=section)
        ranges = self.target.capabilities.iova_ranges
        if ranges is not None and not any(
            start <= section.gpa and section.gpa_end <= end for start, end in ranges
        ):
            expected = ", ".join(describe_range(start, end - start) for start, end in ranges)
            raise UsageError(
                f"{describe_range(section.gpa, section.size)} is outside the target's addresses {expected}",
                value=section,
                expected=expected,
            )

    def entries_for(self, size: int) -> int:
        """Tell how many entries one run of *size* bytes needs."""
        return 1 if self.policy is MappingPolicy.RUN else size // self.page_size

    def remove(self, listener: SectionMapper) -> None:
        """Forget a listener that is registered nowhere any more, and its entries."""
        self.listeners.remove(listener)
        self.entries -= listener.starts.count(0, listener.pages)
        self.mapped_bytes -= listener.mapped.count(0, listener.pages) * PAGE_SIZE

    def __repr__(self) -> str:
        limit = "no limit" if self.limit is None else f"limit {self.limit}"
        return f"<Mapper {self.policy.value} of {self.target!r}: {self.entries} entries, {limit}>"


class SectionMapper:
    """
    The mapper's listener for one section.

    It copes with being told to populate pages that it has mapped already and to discard pages that it
    has not: an undo cannot always know.

    :param mapper: Whose target it drives.
    :param section: Where; pages below are relative to its start.
    :param doubt: Called with pages that may or may not be reachable.
    """

    sparse_discard = True

    def __init__(self, mapper: Mapper, section: RamSection, doubt: Doubt) -> None:
        self.mapper = mapper
        self.granularity = mapper.page_size
        self.section = section
        self.target = mapper.target
        self.pages = section.size // PAGE_SIZE
        self.mapped = SparseBitmap(self.pages)
        self.starts = SparseBitmap(self.pages)
        #: What was reported as in doubt.
        self.uncertain = SparseBitmap(self.pages)
        self._doubt = doubt
        self._step = mapper.page_size // PAGE_SIZE if mapper.policy is MappingPolicy.PAGE else None
        mapper.listeners.append(self)

    @property
    def in_doubt(self) -> bool:
        """Whether the target may still reach pages that it was told to let go of."""
        return self.uncertain.span(0, self.pages, value=True) is not None

    def notify_populate(self, section: RamSection) -> None:
        """
        Map *section*: one mapping, or one per page.

        :raises BaseException: What the target raised. This call has mapped nothing of *section*, or it
            is in doubt.
        """
        start = (section.offset - self.section.offset) // PAGE_SIZE
        end = start + section.size // PAGE_SIZE
        if not self.mapped.count(start, end):
            self._map(start, end)
            return
        for gap_start, gap_end in list(self.mapped.runs(start, end, value=False)):
            self._map(gap_start, gap_end)

    def notify_discard(self, section: RamSection) -> None:
        """
        Unmap the mapped pages of *section*.

        :raises BaseException: What the target raised, or a DmaError for a short unmap. Everything is
            mapped as before, or it is in doubt.
        """
        start = (section.offset - self.section.offset) // PAGE_SIZE
        end = start + section.size // PAGE_SIZE
        mapped = self.mapped.count(start, end)
        if mapped:
            self._unmap(start, end, mapped)

    def let_go(self) -> None:
        """
        Unmap all that the target lets go of: for closing, and for a poisoned memory.

        What it does not let go of is in doubt, and what was in doubt stays so.
        """
        uncertain = list(self.uncertain.runs(0, self.pages))
        certain = SparseBitmap(self.pages)
        certain.restore(0, self.pages, self.mapped.save(0, self.pages))
        for start, end in uncertain:
            certain.clear(start, end)
        for run in list(certain.runs(0, self.pages)):
            for start, end in list(self._pieces(*run)):
                problem = self._try_unmap(start, end)
                if problem is None:
                    self._erase(start, end)
                else:
                    self._report(start, end, problem)
        for run in uncertain:
            for start, end in list(self._pieces(*run)):
                self._try_unmap(start, end)

    def _try_unmap(self, start: int, end: int) -> str | None:
        """Unmap pages, in an undo or on a poisoned memory; say what went wrong, if anything did."""
        size = (end - start) * PAGE_SIZE
        self.mapper.unmap_calls += 1
        try:
            removed = _bytes_removed(self.target.unmap(self._iova(start), size))
        except BaseException as error:  # the rest has to happen whatever comes
            return f"unmap failed: {error!r}"
        return None if removed >= size else f"unmap removed {removed:#x} of {size:#x} bytes"

    def entries_to_populate(self, sections: Iterable[RamSection]) -> int:
        """How many entries *sections* need."""
        return sum(self.mapper.entries_for(section.size) for section in sections)

    def entries_to_discard(self, section: RamSection) -> int:
        """
        How many entries more have to be possible to discard *section* and put it back.

        A mapping that sticks out behind becomes one of its own; one that sticks out in front stays, and
        the part that is put back is a new one. Whole mappings give back what they need.
        """
        start = (section.offset - self.section.offset) // PAGE_SIZE
        end = start + section.size // PAGE_SIZE
        return int(self._continues(start)) + int(self._continues(end))

    def _continues(self, page: int) -> bool:
        """Whether a mapping covers both *page* and the page before it."""
        return page < self.pages and self.mapped.get(page) and not self.starts.get(page)

    def _iova(self, page: int) -> int:
        return self.section.gpa + page * PAGE_SIZE

    def _record(self, start: int, end: int) -> None:
        """Note that [start, end) is mapped, in mappings of our policy."""
        step = self._step
        added = self.mapped.set(start, end)
        if step is None:
            entries = self.starts.set(start, start + 1)
        elif step == 1:
            entries = self.starts.set(start, end)
        else:
            entries = sum(self.starts.set(page, page + 1) for page in range(start, end, step))
        self.mapper.mapped_bytes += added * PAGE_SIZE
        self.mapper.entries += entries

    def _erase(self, start: int, end: int) -> None:
        """Note that nothing of [start, end) is mapped; a mapping that went on behind it starts there now."""
        # As _continues(); a call for each conversion is a call too many here.
        goes_on = end < self.pages and self.mapped.get(end) and not self.starts.get(end)
        new_start = self.starts.set(end, end + 1) if goes_on else 0
        removed = self.mapped.clear(start, end)
        self.mapper.entries += new_start - self.starts.clear(start, end)
        self.mapper.mapped_bytes -= removed * PAGE_SIZE

    def _map_piece(self, page: int, pages: int) -> None:
        section = self.section
        block = section.block
        start = page * PAGE_SIZE
        offset = section.offset + start
        memory = HostRange(block.fd, offset, block.address + offset, pages * PAGE_SIZE)
        self.mapper.map_calls += 1
        self.target.map(section.gpa + start, memory, writable=not section.readonly)

    def _map(self, start: int, end: int) -> None:
        """Map pages that are not mapped, and note it."""
        step = self._step or end - start
        position = start
        try:
            while position < end:
                self._map_piece(position, step)
                position += step
            self._record(start, end)
        except BaseException as error:
            self._unmap_after_failure(start, position, min(position + step, end), error)
            raise

    def _unmap_after_failure(
        self, start: int, position: int, in_flight_end: int, error: BaseException
    ) -> None:
        """[start, position) is mapped for certain, [position, in_flight_end) perhaps: unmap both."""
        self._erase(start, in_flight_end)
        step = position - start
        if self.mapper.exact and self._step:
            step = self._step
        for piece in range(start, position, step or 1):
            problem = self._try_unmap(piece, piece + step)
            if problem is not None:
                self._report(piece, piece + step, problem)
        if position < in_flight_end and not _is_refusal(error):
            problem = self._unmap_uncertain(position, in_flight_end)
            if problem is not None:
                self._report(position, in_flight_end, problem)

    def _unmap_uncertain(self, start: int, end: int) -> str | None:
        """
        Unmap one mapping that exists or not; say what is left in doubt, if anything is.

        An unmap that removes nothing may be short, so a map is the second witness: where it succeeds
        nothing was left.
        """
        size = (end - start) * PAGE_SIZE
        removed, problem = self._unmap_perhaps_nothing(start, end)
        if problem is not None or removed is None or removed >= size:
            return problem
        if removed:
            return f"unmap removed {removed:#x} of {size:#x} bytes"
        try:
            self._map_piece(start, end - start)
        except BaseException as error:  # part of an undo
            return f"unmap removed nothing, and mapping it again failed: {error!r}"
        return self._try_unmap(start, end)

    def _unmap_perhaps_nothing(self, start: int, end: int) -> tuple[int | None, str | None]:
        """
        Unmap pages of which it is not known whether they are mapped; part of an undo.

        :return: The bytes removed, None where the target says that there is no such mapping; and the
            problem, if there is one.
        """
        self.mapper.unmap_calls += 1
        try:
            size = (end - start) * PAGE_SIZE
            return _bytes_removed(self.target.unmap(self._iova(start), size)), None
        except BaseException as error:
            if getattr(error, "errno", None) == errno.ENOENT:
                return None, None
            return None, f"unmap failed: {error!r}"

    def _pieces(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Give what one unmap call each names: everything, or the mappings one by one."""
        if not self.mapper.exact:
            return ((start, end),)
        step = self._step
        assert step is not None  # policy RUN needs a target that is not exact
        return (
            (page, page + step)
            for run_start, run_end in self.mapped.runs(start, end)
            for page in range(run_start, run_end, step)
        )

    def _unmap(self, start: int, end: int, mapped: int) -> None:
        """Unmap the *mapped* pages of [start, end), and note it."""
        saved: SavedBits | None = None
        if mapped < end - start:
            span = self.mapped.span(start, end, value=True)
            assert span is not None  # the caller has counted
            start, end = span
            saved = self.mapped.save(start, end)
        position, in_flight_end, pages = start, end, mapped
        gpa = self.section.gpa
        try:
            for position, in_flight_end in (
                self._pieces(start, end) if self.mapper.exact else ((start, end),)
            ):
                if self.mapper.exact:
                    pages = in_flight_end - position
                iova, size = gpa + position * PAGE_SIZE, (in_flight_end - position) * PAGE_SIZE
                self.mapper.unmap_calls += 1
                removed = self.target.unmap(iova, size)
                # Not only short ones: None is the answer of a target that forgot to give one.
                if type(removed) is not int or removed < pages * PAGE_SIZE:
                    raise _ShortUnmapError(iova, size, removed, pages * PAGE_SIZE)
            position = in_flight_end
            self._erase(start, end)
        except BaseException as error:
            runs = SparseBitmap(self.pages)
            if saved is None:
                runs.set(start, end)
            else:
                runs.restore(start, end, saved)
            self._map_after_failure(runs, start, position, in_flight_end, error)
            raise

    def _map_after_failure(
        self,
        runs: SparseBitmap,
        start: int,
        position: int,
        in_flight_end: int,
        error: BaseException,
    ) -> None:
        """
        Map everything again that was mapped (*runs*).

        [start, position) is unmapped for certain, [position, in_flight_end) perhaps.
        """
        if isinstance(error, _ShortUnmapError):
            self._report_runs(runs, position, in_flight_end, str(error))
        elif not _is_refusal(error) and position < in_flight_end:
            # Not known whether it happened: make sure it has. A short answer shows when the pages
            # are mapped again.
            _, problem = self._unmap_perhaps_nothing(position, in_flight_end)
            if problem is None:
                position = in_flight_end
            else:
                self._report_runs(runs, position, in_flight_end, problem)
        if position == start:
            return
        self._erase(start, position)
        for run_start, run_end in list(runs.runs(start, position)):
            try:
                self._map(run_start, run_end)
            except BaseException as failure:  # the other runs have to be mapped all the same
                self._report(run_start, run_end, f"could not be mapped again: {failure!r}")

    def _report_runs(self, runs: SparseBitmap, start: int, end: int, reason: str) -> None:
        """Put those pages of [start, end) into doubt that were mapped (*runs*)."""
        for run_start, run_end in list(runs.runs(start, end)):
            self._report(run_start, run_end, reason)

    def _report(self, start: int, end: int, reason: str) -> None:
        """Put [start, end) into doubt. The books call it mapped, so that a detach tries to unmap it."""
        self._record(start, end)
        self.uncertain.set(start, end)
        base = self.section.offset
        part = self.section.part(base + start * PAGE_SIZE, base + end * PAGE_SIZE)
        self._doubt(part, self, reason)

    def __repr__(self) -> str:
        return f"<SectionMapper of {self.section!r} on {self.target!r}>"


def _is_refusal(error: BaseException) -> bool:
    """Whether the target says that the call did nothing."""
    return isinstance(error, DmaError) and not error.in_doubt


def _bytes_removed(answer: int) -> int:
    """Check the answer of a target's unmap; a target that forgot to give one answers None."""
    if type(answer) is not int:
        raise TypeError(f"unmap returned {answer!r}, not the number of bytes it removed")
    return answer


class _ShortUnmapError(DmaError):
    """The target removed fewer bytes than were mapped."""

    def __init__(self, iova: int, size: int, removed: object, expected: int) -> None:
        told = f"{removed:#x}" if isinstance(removed, int) else repr(removed)
        super().__init__(
            f"unmap of {describe_range(iova, size)} removed {told} of {expected:#x} bytes",
            iova=iova,
            size=size,
            in_doubt=True,
        )
