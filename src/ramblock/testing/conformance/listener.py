# SPDX-License-Identifier: Apache-2.0
"""Whether a listener does what :class:`~ramblock.Listener` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

from hypothesis import strategies as st

from ramblock.discard.attributes import PageState
from ramblock.discard.listeners import Listener
from ramblock.discard.section import RamSection
from ramblock.errors import describe_range
from ramblock.guest.block import RamBlock
from ramblock.testing.conformance.exploring import Story, explore, sequences
from ramblock.testing.strategies import Operation, Verb, operations, page_ranges
from ramblock.units import PAGE_SIZE

__all__ = ["check_listener"]

L = TypeVar("L", bound=Listener)

Ranges: TypeAlias = Iterable[tuple[int, int]]

_SIZE = 16 * PAGE_SIZE
_GPA = 1 << 32


class _RefusedError(Exception):
    """What the neighbour raises."""


def check_listener(
    make_listener: Callable[[], L],
    held: Callable[[L], Ranges],
    *,
    examples: int | None = None,
) -> None:
    """
    Check a listener against everything that the reference says of one.

    It is registered for a part of a block, away from the block's first byte, and hears random
    changes, some of which another listener refuses after it. After each call it holds exactly the
    pages that it held before and heard of; a call that it refuses itself changes nothing. Taken
    out, it holds nothing, and it can be registered again.

    :param make_listener: Makes one that holds nothing.
    :param held: Tells what it holds, as (offset, size) in bytes of the block, in any order.
    :param examples: How many; None: the current profile of Hypothesis says.
    :raises AssertionError: It does not; the text tells the steps.
    """
    refusals = st.sampled_from([None, None, 1, 2, 3])
    steps = sequences(st.tuples(operations(_SIZE), refusals), 16)

    def check(example: tuple[tuple[int, int], list[tuple[Operation, int | None]]]) -> None:
        (offset, size), todo = example
        with RamBlock.create("conformance", _SIZE, private="stand-in") as block:
            listener = make_listener()
            section = RamSection(block, offset, size, _GPA)
            _Bench(block, section, listener, lambda: held(listener)).run(todo)

    explore(st.tuples(page_ranges(_SIZE), steps), check, examples)


class _Neighbour:
    """A listener behind the one that is checked, which refuses on request."""

    def __init__(self) -> None:
        self.calls_until: int | None = None

    def notify_populate(self, section: RamSection) -> None:
        self._hear()

    def notify_discard(self, section: RamSection) -> None:
        self._hear()

    def _hear(self) -> None:
        if self.calls_until is not None:
            self.calls_until -= 1
            if self.calls_until == 0:
                self.calls_until = None
                raise _RefusedError("the neighbour was told to refuse")


class _Watched:
    """
    The listener, with a comparison around each of its calls.

    A failure is kept until the change is over: the manager would take it for a refusal.
    """

    def __init__(self, inner: Listener, story: Story, held: Callable[[], set[int]]) -> None:
        self.inner = inner
        self.refused = False
        self.failure: AssertionError | None = None
        self._story = story
        self._held = held

    @property
    def sparse_discard(self) -> bool:
        return bool(getattr(self.inner, "sparse_discard", False))

    def notify_populate(self, section: RamSection) -> None:
        before, pages = self._held(), _pages_of(section)
        self._story.step(f"it hears: populate {section!r}")
        try:
            self.inner.notify_populate(section)
        except Exception as error:
            self._refused(f"populate ({error!r})", before, before)
            raise
        self._expect(before | pages)

    def notify_discard(self, section: RamSection) -> None:
        before, pages = self._held(), _pages_of(section)
        self._story.step(f"it hears: discard {section!r}")
        try:
            self.inner.notify_discard(section)
        except Exception as error:
            # What it may or may not hold still is some of this section.
            self._refused(f"discard ({error!r})", before - pages, before)
            raise
        self._expect(before - pages)

    def _refused(self, call: str, least: set[int], most: set[int]) -> None:
        self.refused = True
        now = self._held()
        if not least <= now <= most:
            self._fail(f"it refused a {call} and holds {_show(now)}, before {_show(most)}")

    def _expect(self, wanted: set[int]) -> None:
        now = self._held()
        if now != wanted:
            self._fail(f"it holds {_show(now)}, expected {_show(wanted)}")

    def _fail(self, problem: str) -> None:
        if self.failure is None:
            try:
                self._story.fail(problem)
            except AssertionError as failure:
                self.failure = failure


class _Bench:
    """A block, the listener, and one behind it."""

    def __init__(
        self, block: RamBlock, section: RamSection, listener: Listener, held: Callable[[], Ranges]
    ) -> None:
        assert block.attributes is not None
        self.story = Story(f"{type(listener).__name__} on {section!r}")
        self._attributes = block.attributes
        self._manager = block.discard_manager
        self._section = section
        self._held = held
        self._watched = _Watched(listener, self.story, self._pages_held)
        self._neighbour = _Neighbour()

    def run(self, todo: list[tuple[Operation, int | None]]) -> None:
        """Register, change, unregister; and once more."""
        self._attributes.state_change(4 * PAGE_SIZE, 2 * PAGE_SIZE, PageState.SHARED)
        for steps in (todo, []):
            self.story.step("register")
            if not self._attempt(self._register):
                self._expect(set())
                return
            for operation, refuse_at in steps:
                if operation.verb in (Verb.SHARE, Verb.MAKE_PRIVATE):
                    self._change(operation, refuse_at)
            self.story.step("unregister")
            self._manager.unregister_listener(self._neighbour)
            if self._attempt(lambda: self._manager.unregister_listener(self._watched)):
                self._expect(set())

    def _register(self) -> None:
        self._manager.register_listener(self._watched, self._section)
        self._manager.register_listener(self._neighbour, self._section)

    def _change(self, operation: Operation, refuse_at: int | None) -> None:
        to = PageState.SHARED if operation.verb is Verb.SHARE else PageState.PRIVATE
        refused = "" if refuse_at is None else ", which a neighbour may refuse"
        self.story.step(
            f"make {describe_range(operation.offset, operation.size)} {to.name}{refused}"
        )
        self._neighbour.calls_until = refuse_at
        self._attempt(lambda: self._attributes.state_change(operation.offset, operation.size, to))
        self._neighbour.calls_until = None
        self._expect(self._populated())

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Make a call that may fail because the listener or its neighbour refuses."""
        self._watched.refused = False
        try:
            call()
        except _RefusedError:
            worked = False
        except Exception as error:
            if not self._watched.refused:
                self.story.fail(f"it raised {error!r}", error)
            worked = False
        else:
            worked = True
        if self._watched.failure is not None:
            raise self._watched.failure
        return worked

    def _pages_held(self) -> set[int]:
        return _flat(self._held(), self.story)

    def _populated(self) -> set[int]:
        parts = self._manager.populated(self._section)
        return {page for part in parts for page in _pages_of(part)}

    def _expect(self, wanted: set[int]) -> None:
        now = self._pages_held()
        if now != wanted:
            self.story.fail(f"it holds {_show(now)}, populated is {_show(wanted)}")


def _pages_of(section: RamSection) -> set[int]:
    return set(range(section.offset, section.end, PAGE_SIZE))


def _flat(ranges: Ranges, story: Story) -> set[int]:
    pages: set[int] = set()
    for offset, size in ranges:
        if (offset | size) % PAGE_SIZE or size <= 0:
            story.fail(f"it says that it holds {describe_range(offset, size)}: not whole pages")
        pages.update(range(offset, offset + size, PAGE_SIZE))
    return pages


def _show(pages: set[int]) -> str:
    return "{" + ", ".join(f"{page:#x}" for page in sorted(pages)) + "}"
