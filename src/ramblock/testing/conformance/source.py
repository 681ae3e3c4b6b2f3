# SPDX-License-Identifier: Apache-2.0
"""Whether a discard source does what :class:`~ramblock.Source` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from hypothesis import strategies as st

from ramblock.discard.section import RamSection
from ramblock.discard.sources import Source
from ramblock.errors import UsageError, describe_range
from ramblock.guest.block import RamBlock
from ramblock.testing.conformance.exploring import Story, explore, sequences
from ramblock.testing.strategies import page_ranges
from ramblock.units import PAGE_SIZE

__all__ = ["check_source"]

S = TypeVar("S", bound=Source)


class _Change(NamedTuple):
    offset: int
    size: int
    populate: bool
    refuse: bool


class _RefusedError(Exception):
    """What the listener of the check raises."""


def check_source(
    make_source: Callable[[RamBlock], S],
    *,
    change: Callable[[S, int, int, bool], object] | None = None,
    size: int = 16 * PAGE_SIZE,
    examples: int | None = None,
) -> None:
    """
    Check a discard source against everything that the reference says of one.

    Its two answers agree for ranges of any alignment: ``is_populated`` of a range is that of all
    its granules, and ``ranges``, where there are any, ascend, lie inside the range that was asked
    for, and agree with ``is_populated``. Asking changes nothing. With *change*, a listener of the
    block hears every change exactly, and a change that the listener refuses has not happened.

    :param make_source: Makes a source for a block, in any state. It may add itself to the block.
    :param change: Makes ``(source, offset, size, populate)`` populated or discarded, whole granules
        of it, and tells the block's manager. Where it cannot it raises a
        :class:`~ramblock.errors.UsageError` and changes nothing.
    :param size: Of the block, in bytes; a multiple of the source's granularity.
    :param examples: How many; None: the current profile of Hypothesis says.
    :raises AssertionError: It does not; the text tells the steps.
    """
    with RamBlock.create("conformance", size) as block:
        granularity = _check_granularity(make_source(block), size)
    step = st.builds(
        lambda where, populate, refuse: _Change(where[0], where[1], populate, refuse),
        page_ranges(size, granularity=granularity),
        st.booleans(),
        st.sampled_from([False, False, True]),
    )
    changes = sequences(step, 0 if change is None else 12)
    questions = st.lists(page_ranges(size, granularity=1), min_size=1, max_size=5)

    def check(example: tuple[list[_Change], list[tuple[int, int]]]) -> None:
        todo, asked = example
        with RamBlock.create("conformance", size) as block:
            source = make_source(block)
            bench = _Bench(block, source)
            bench.ask([(0, size), *asked])
            bench.join()
            for step in todo:
                assert change is not None  # else there are no steps
                bench.change(step, lambda s: change(source, s.offset, s.size, s.populate))
                bench.ask(asked)
            bench.leave()

    explore(st.tuples(changes, questions), check, examples)


def _check_granularity(source: Source, size: int) -> int:
    granularity = source.granularity
    if type(granularity) is not int or granularity < 1 or granularity & (granularity - 1):
        Story(type(source).__name__).fail(
            f"granularity is {granularity!r}, which is no power of two"
        )
    if size % granularity:
        Story(type(source).__name__).fail(
            f"the block has {size:#x} bytes, no multiple of {granularity:#x}"
        )
    return granularity


class _Ear:
    """A listener that holds what it hears, and refuses the next call on request."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.refuse = False
        self.refused = False
        self.wrong: list[str] = []

    def notify_populate(self, section: RamSection) -> None:
        granules = self._hear(section)
        if granules & self.held:
            self.wrong.append(f"populate of {section!r}, some of which was populated")
        self.held |= granules

    def notify_discard(self, section: RamSection) -> None:
        granules = self._hear(section)
        if not granules <= self.held:
            self.wrong.append(f"discard of {section!r}, some of which was not populated")
        self.held -= granules

    def _hear(self, section: RamSection) -> set[int]:
        if self.refuse:
            self.refuse, self.refused = False, True
            raise _RefusedError("the listener was told to refuse")
        return set(range(section.offset, section.end, PAGE_SIZE))


class _Bench:
    """A block with the source and a listener."""

    def __init__(self, block: RamBlock, source: Source) -> None:
        self.story = Story(type(source).__name__)
        self._block = block
        self._source = source
        self._ear = _Ear()

    # -- asking -----------------------------------------------------------------------------------

    def ask(self, questions: list[tuple[int, int]]) -> None:
        """Compare the answers to questions of any alignment with those of each granule."""
        populated = self._populated()
        for offset, size in questions:
            where = describe_range(offset, size)
            wanted = all(granule in populated for granule in self._granules(offset, offset + size))
            with self.story.no_error(f"is_populated of {where}"):
                answer = self._source.is_populated(offset, size)
            if answer is not wanted:
                self.story.fail(
                    f"is_populated of {where} answered {answer!r}; its granules say {wanted}"
                )
            self._ask_ranges(offset, size, populated)
        if self._populated() != populated:
            self.story.fail("its answers change with being asked")

    def _granules(self, start: int, end: int) -> range:
        step = self._source.granularity
        return range(start // step * step, end, step)

    def _populated(self) -> set[int]:
        """Ask for each granule, by its first byte."""
        size = self._source.granularity
        return {
            offset
            for offset in self._granules(0, self._block.size)
            if self._source.is_populated(offset, size)
        }

    def _ask_ranges(self, offset: int, size: int, populated: set[int]) -> None:
        ranges = getattr(self._source, "ranges", None)
        if ranges is None:
            return
        where, end = describe_range(offset, size), offset + size
        with self.story.no_error(f"ranges in {where}"):
            answer = list(ranges(offset, size))
        said, position = set[int](), offset
        for low, length in answer:
            if length <= 0 or low < position or low + length > end:
                self.story.fail(
                    f"ranges in {where} gave {_describe(answer)}: not ascending, or not inside"
                )
            position = low + length
            said.update(self._granules(low, position))
            if any(edge % self._source.granularity for edge in {low, position} - {offset, end}):
                self.story.fail(f"ranges in {where} gave {_describe(answer)}: part of a granule")
        wanted = populated & set(self._granules(offset, end))
        if said != wanted:
            differing = ", ".join(f"{granule:#x}" for granule in sorted(said ^ wanted)[:4])
            self.story.fail(
                f"ranges in {where} gave {_describe(answer)}, is_populated differs at {differing}"
            )

    # -- changing ---------------------------------------------------------------------------------

    def join(self) -> None:
        """Add the source to the block, if it has not done so itself, and listen."""
        manager = self._block.discard_manager
        section = RamSection(self._block, 0, self._block.size)
        if self._source not in manager.sources:
            with self.story.no_error("add_source"):
                manager.add_source(self._source)
        manager.register_listener(self._ear, section)
        self._judge()

    def change(self, step: _Change, make: Callable[[_Change], object]) -> None:
        """Make a change, or one that is refused; what is heard is what changed."""
        offset, size, populate, refuse = step
        verb = "populate" if populate else "discard"
        refused = ", which a listener refuses" if refuse else ""
        self.story.step(f"{verb} {describe_range(offset, size)}{refused}")
        before = self._populated()
        self._ear.refuse, self._ear.refused = refuse, False
        try:
            make(step)
        except UsageError:
            wanted = before
        except Exception as error:
            if not self._ear.refused:
                self.story.fail(f"it raised {error!r}", error)
            wanted = before
        else:
            if self._ear.refused:
                self.story.fail("a listener refused, and the change says nothing of it")
            granules = set(self._granules(offset, offset + size))
            wanted = before | granules if populate else before - granules
        self._ear.refuse = False
        if self._populated() != wanted:
            self.story.fail(f"populated is {_pages(self._populated())}, expected {_pages(wanted)}")
        self._judge()

    def _judge(self) -> None:
        if self._ear.wrong:
            self.story.fail(f"a listener heard a {self._ear.wrong[0]}")
        step = self._source.granularity
        pages = {
            page
            for granule in self._populated()
            for page in range(granule // PAGE_SIZE * PAGE_SIZE, granule + step, PAGE_SIZE)
        }
        if step >= PAGE_SIZE and self._ear.held != pages:
            self.story.fail(f"a listener holds {_pages(self._ear.held)}, expected {_pages(pages)}")

    def leave(self) -> None:
        """Take the source out, where that is possible, and put it back."""
        manager = self._block.discard_manager
        self.story.step("remove_source, add_source")
        try:
            manager.remove_source(self._source)
        except UsageError:
            return  # one that stays for ever, as page attributes do
        with self.story.no_error("add_source, after remove_source"):
            manager.add_source(self._source)
        self._judge()


def _describe(ranges: list[tuple[int, int]]) -> str:
    return "[" + ", ".join(describe_range(offset, size) for offset, size in ranges) + "]"


def _pages(addresses: set[int]) -> str:
    return "{" + ", ".join(f"{address:#x}" for address in sorted(addresses)) + "}"
