# SPDX-License-Identifier: Apache-2.0
"""
Keeps the mappings of one DMA target in step with what is populated (QEMU: hw/vfio/listener.c).

Theory of operation. The mapper is a listener of the discard manager of every section, here IOVA =
GPA. For each section it keeps two bits per page, taking memory only where something is mapped:
*mapped*, and *start*, set on the first page of each mapping. No more is needed: the number of set
starts is the number of entries, cutting out a range clears its bits and sets the start behind it,
and a target that wants whole mappings back gets the pieces between starts::

    page     0 1 2 3 4 5 6 7            0 1 2 3 4 5 6 7
    mapped   . # # # # # # .   cut 3    . # # . # # # .
    start    . # . . . . . .            . # . . # . . .

After a failure. A call of ours that raises leaves the target and the two bitmaps as before the
call, or it has reported the pages as in doubt. The target's own word is not enough for that: the
bytes that an unmap returns are checked against the bytes that were mapped; and after an exception
that is no refusal the call may or may not have been carried out, so the mapper makes sure before it
goes on.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

from ramblock.bitmap import SavedBits, SparseBitmap
from ramblock.discard.section import RamSection
from ramblock.dma.target import DmaTarget, HostRange, MappingPolicy
from ramblock.errors import DmaError, MappingLimitError, UsageError, describe_error, describe_range
from ramblock.logs import Sparingly
from ramblock.process import OfOneProcess
from ramblock.units import PAGE_SIZE, new_tuple

_log = logging.getLogger(__name__)

# Reports pages that a target may or may not still reach: section, listener, reason.
_Doubt = Callable[[RamSection, object, str], None]

# An operator should hear of a budget before it refuses something; the share is ours.
_NEARLY_USED_UP = 0.9


class Mapper(OfOneProcess):
    """One target's mappings. Made by ``GuestMemory.attach``, which says what is raised."""

    def __init__(self, target: DmaTarget, policy: MappingPolicy, max_mappings: int | None) -> None:
        capabilities = target.capabilities
        if not isinstance(policy, MappingPolicy):
            text = f"{policy!r} is not a mapping policy"
            raise UsageError(text, value=policy, expected="PAGE, RUN or AUTO")
        cuts = capabilities.cut and not capabilities.exact
        if policy is MappingPolicy.RUN and not cuts:
            text = f"policy RUN needs a target that cuts, {target!r} cannot"
            raise UsageError(text, value=policy, expected="PAGE or AUTO")
        if policy is MappingPolicy.AUTO:
            policy = MappingPolicy.RUN if cuts else MappingPolicy.PAGE
        self.target = target
        self.policy = policy
        limits = [limit for limit in (max_mappings, capabilities.max_mappings) if limit is not None]
        #: How many mappings may exist at once; None: any number.
        self.limit = min(limits, default=None)
        #: Smallest piece that one mapping covers, in bytes.
        self.page_size = max(capabilities.page_size, PAGE_SIZE)
        self.exact = capabilities.exact
        self.entries = 0  #: Mappings that exist now.
        self.mapped_bytes = 0  #: Bytes that devices can reach now.
        self.map_calls = 0  #: Calls made so far, those of undone conversions too.
        self.unmap_calls = 0
        self.listeners: list[SectionMapper] = []
        self._warned = False
        self._log_refusal = Sparingly(_log)
        self._log_nearly = Sparingly(_log)

    def require(self, extra: int) -> None:
        """Raise :class:`MappingLimitError` unless *extra* entries more may exist at once."""
        limit, needed = self.limit, self.entries + extra
        if limit is None or extra <= 0:
            return
        if needed > limit:
            message = "refused: %d mappings needed, limit %d, target %r"
            self._log_refusal(message, needed, limit, self.target)
            text = f"{needed} mappings needed, {self.entries} in use, limit {limit}"
            raise MappingLimitError(text, limit=limit, needed=needed)
        nearly = needed >= limit * _NEARLY_USED_UP
        if nearly and not self._warned:
            message = "%d of %d mappings will be in use on target %r"
            self._log_nearly(message, needed, limit, self.target)
        self._warned = nearly

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

    It copes with being told to populate pages that it has mapped already and to discard pages that
    it has not: an undo cannot always know.

    :param section: Pages below are relative to its start.
    :param doubt: Called with pages that may or may not be reachable.
    """

    sparse_discard = True

    def __init__(self, mapper: Mapper, section: RamSection, doubt: _Doubt) -> None:
        self.mapper = mapper
        self.granularity = mapper.page_size
        self.section = section
        self.target = mapper.target
        self.pages = section.size // PAGE_SIZE
        self.mapped = SparseBitmap(self.pages)
        self.starts = SparseBitmap(self.pages)
        self.uncertain = SparseBitmap(self.pages)  #: The pages that were reported as in doubt.
        self._doubt = doubt
        self._step = mapper.page_size // PAGE_SIZE if mapper.policy is MappingPolicy.PAGE else None
        mapper.listeners.append(self)

    @property
    def in_doubt(self) -> bool:
        """Whether the target may still reach pages that it was told to let go of."""
        return bool(self.uncertain.count(0, self.pages))

    def notify_populate(self, section: RamSection) -> None:
        """Map *section*. After an exception it is as before, or in doubt."""
        start = (section.offset - self.section.offset) // PAGE_SIZE
        end = start + section.size // PAGE_SIZE
        if not self.mapped.count(start, end):
            self._map(start, end)
            return
        gaps = list(self.mapped.runs(start, end, value=False))
        for number, gap in enumerate(gaps):
            try:
                self._map(*gap)
            except BaseException:
                for before in gaps[:number]:
                    self._let_go_of(*before)
                raise

    def notify_discard(self, section: RamSection) -> None:
        """Unmap *section*. After an exception it is as before, or in doubt."""
        start = (section.offset - self.section.offset) // PAGE_SIZE
        end = start + section.size // PAGE_SIZE
        mapped = self.mapped.count(start, end)
        if mapped:
            self._unmap(start, end, mapped)

    def let_go(self) -> None:
        """Unmap as much as the target lets go of; the rest is in doubt, or stays so."""
        uncertain = list(self.uncertain.runs(0, self.pages))
        certain = SparseBitmap(self.pages)
        certain.restore(0, self.pages, self.mapped.save(0, self.pages))
        for start, end in uncertain:
            certain.clear(start, end)
        for run in (*certain.runs(0, self.pages), *uncertain):
            self._let_go_of(*run)

    def _let_go_of(self, start: int, end: int) -> None:
        for piece in list(self._pieces(start, end)):
            _, problem = self._try_unmap(*piece)
            if self.uncertain.get(piece[0]):
                continue
            if problem is None:
                self._erase(*piece)
            else:
                self._report(*piece, problem)

    def entries_to_populate(self, sections: Iterable[RamSection]) -> int:
        """How many entries *sections* need."""
        return sum(self.mapper.entries_for(section.size) for section in sections)

    def entries_to_discard(self, section: RamSection) -> int:
        """
        How many more entries have to be possible to discard *section* and put it back.

        A mapping that sticks out behind becomes one of its own; one that sticks out in front stays,
        and the part that is put back is a new one. Whole mappings give back their entries.
        """
        start = (section.offset - self.section.offset) // PAGE_SIZE
        return self._continues(start) + self._continues(start + section.size // PAGE_SIZE)

    def _continues(self, page: int) -> bool:
        # Whether a mapping covers both *page* and the page before it.
        return page < self.pages and self.mapped.get(page) and not self.starts.get(page)

    def _record(self, start: int, end: int) -> None:
        # [start, end) is mapped, in mappings of our policy.
        step = self._step
        added = self.mapped.set(start, end)
        if step is None or step == 1:
            entries = self.starts.set(start, end if step else start + 1)
        else:
            entries = sum(self.starts.set(page, page + 1) for page in range(start, end, step))
        self.mapper.mapped_bytes += added * PAGE_SIZE
        self.mapper.entries += entries

    def _erase(self, start: int, end: int) -> None:
        # Nothing of [start, end) is mapped; a mapping that went on behind it starts there now.
        # As _continues(); a call for each conversion is a call too many here.
        goes_on = end < self.pages and self.mapped.get(end) and not self.starts.get(end)
        new_start = self.starts.set(end, end + 1) if goes_on else 0
        removed = self.mapped.clear(start, end)
        self.mapper.entries += new_start - self.starts.clear(start, end)
        self.mapper.mapped_bytes -= removed * PAGE_SIZE

    def _map_piece(self, page: int, pages: int) -> None:
        section, start = self.section, page * PAGE_SIZE
        block, offset = section.block, section.offset + start
        at = block.fd, offset, block.address + offset, pages * PAGE_SIZE
        memory = new_tuple(HostRange, at)
        self.mapper.map_calls += 1
        self.target.map(section.gpa + start, memory, writable=not section.readonly)

    def _map(self, start: int, end: int) -> None:
        # Of [start, end) nothing is mapped.
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
        self, start: int, position: int, stop: int, error: BaseException
    ) -> None:
        # [start, position) is mapped for certain, [position, stop) perhaps: unmap both.
        self._erase(start, stop)
        step = self._step if self.mapper.exact and self._step else position - start
        for piece in range(start, position, step or 1):
            _, problem = self._try_unmap(piece, piece + step)
            if problem is not None:
                self._report(piece, piece + step, problem)
        if position == stop or (isinstance(error, DmaError) and not error.in_doubt):
            return  # a refusal did nothing
        removed, problem = self._try_unmap(position, stop, perhaps=True)
        size = (stop - position) * PAGE_SIZE
        if problem is None and removed < size:
            problem = f"unmap removed {removed:#x} of {size:#x} bytes"
            if not removed:
                # It may be short: where a map succeeds, the second witness, nothing was left.
                try:
                    self._map_piece(position, stop - position)
                    _, problem = self._try_unmap(position, stop)
                except BaseException as failure:  # part of an undo
                    text = describe_error(failure)
                    problem = f"unmap removed nothing, and mapping it again failed: {text}"
        if problem is not None:
            self._report(position, stop, problem)

    def _try_unmap(self, start: int, end: int, *, perhaps: bool = False) -> tuple[int, str | None]:
        # In an undo, or on a poisoned memory: the rest has to happen whatever comes. Returns the
        # bytes removed and the problem, if there is one. Of pages that are *perhaps* mapped fewer
        # may be removed, and ENOENT says that none is left.
        size = (end - start) * PAGE_SIZE
        self.mapper.unmap_calls += 1
        try:
            removed = self.target.unmap(self.section.gpa + start * PAGE_SIZE, size)
            if type(removed) is not int:  # a target that forgot to answer
                raise TypeError(f"unmap returned {removed!r}, not the number of bytes it removed")
        except BaseException as error:
            if perhaps and getattr(error, "errno", None) == errno.ENOENT:
                return size, None
            return 0, f"unmap failed: {describe_error(error)}"
        if removed >= size or perhaps:
            return removed, None
        return removed, f"unmap removed {removed:#x} of {size:#x} bytes"

    def _pieces(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        # Each is for one unmap call: everything, or the mappings one by one.
        step = self._step
        if not self.mapper.exact:
            return ((start, end),)
        assert step is not None  # policy RUN needs a target that is not exact
        runs = self.mapped.runs(start, end)
        return ((page, page + step) for first, last in runs for page in range(first, last, step))

    def _unmap(self, start: int, end: int, mapped: int) -> None:
        # Of [start, end), *mapped* pages are mapped.
        saved: SavedBits | None = None
        if mapped < end - start:
            span = self.mapped.span(start, end, value=True)
            assert span is not None  # the caller has counted
            start, end = span
            saved = self.mapped.save(start, end)
        position, stop, pages = start, end, mapped
        gpa, exact = self.section.gpa, self.mapper.exact
        try:
            # (As the pieces of a target that is not exact, without a call.)
            for position, stop in self._pieces(start, end) if exact else ((start, end),):
                if exact:
                    pages = stop - position
                iova, size = gpa + position * PAGE_SIZE, (stop - position) * PAGE_SIZE
                self.mapper.unmap_calls += 1
                removed = self.target.unmap(iova, size)
                # Not only short ones: None is the answer of a target that forgot to give one.
                if type(removed) is not int or removed < pages * PAGE_SIZE:
                    raise _ShortUnmapError(iova, size, removed, pages * PAGE_SIZE)
            position = stop
            self._erase(start, end)
        except BaseException as error:
            runs = SparseBitmap(self.pages)
            if saved is None:
                runs.set(start, end)
            else:
                runs.restore(start, end, saved)
            self._map_after_failure(runs, start, position, stop, error)
            raise

    def _map_after_failure(
        self, runs: SparseBitmap, start: int, position: int, stop: int, error: BaseException
    ) -> None:
        # Of *runs*, which were mapped, [start, position) is unmapped for certain, and
        # [position, stop) perhaps: map all of it again.
        problem: str | None = None
        if isinstance(error, _ShortUnmapError):
            problem = str(error)
        elif position < stop and (not isinstance(error, DmaError) or error.in_doubt):
            # No refusal: not known whether it happened, so make sure it has. A short answer shows
            # when the pages are mapped again.
            _, problem = self._try_unmap(position, stop, perhaps=True)
            if problem is None:
                position = stop
        if problem is not None:
            for run in list(runs.runs(position, stop)):
                self._report(*run, problem)
        if position == start:
            return
        self._erase(start, position)
        for run in list(runs.runs(start, position)):
            try:
                self._map(*run)
            except BaseException as failure:  # the other runs have to be mapped all the same
                self._report(*run, f"could not be mapped again: {describe_error(failure)}")

    def _report(self, start: int, end: int, reason: str) -> None:
        # In doubt. The books call it mapped, so that a detach tries to unmap it.
        self._record(start, end)
        self.uncertain.set(start, end)
        base = self.section.offset
        part = self.section.part(base + start * PAGE_SIZE, base + end * PAGE_SIZE)
        self._doubt(part, self, reason)


class _ShortUnmapError(DmaError):
    def __init__(self, iova: int, size: int, removed: object, expected: int) -> None:
        told = f"{removed:#x}" if isinstance(removed, int) else repr(removed)
        text = f"unmap of {describe_range(iova, size)} removed {told} of {expected:#x} bytes"
        super().__init__(text, iova=iova, size=size, in_doubt=True)
