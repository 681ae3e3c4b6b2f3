# SPDX-License-Identifier: Apache-2.0
"""Whether a DMA target does what :class:`~ramblock.DmaTarget` says."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, NamedTuple, TypeVar

from hypothesis import strategies as st

from ramblock.dma.target import DmaCapabilities, DmaTarget, HostRange
from ramblock.errors import DmaError, describe_range
from ramblock.testing.conformance.exploring import Story, explore
from ramblock.testing.conformance.guest import check_guest
from ramblock.testing.conformance.target_model import PAGES, Step, steps
from ramblock.testing.conformance.target_player import Device, TargetPlayer, View
from ramblock.units import ADDRESS_LIMIT, PAGE_SIZE

__all__ = ["Device", "check_target"]

T = TypeVar("T", bound=DmaTarget)

# Where guests have their memory above the devices; any place will do.
_USUAL_BASE = 1 << 32
#: Up to so many entries a target is filled to see what it says then.
_MOST_ENTRIES = 1024


def check_target(
    make_target: Callable[[], T],
    *,
    device: Callable[[T], Device] | None = None,
    reaches: Callable[[T, int], bool] | None = None,
    reuse: bool = False,
    examples: int | None = None,
) -> None:
    """
    Check a DMA target against everything that the reference says of one with its capabilities.

    First by itself, beside a naive model of pages: answers (type and value), errors (``DmaError``
    with errno, ``iova`` and ``size``), parts of mappings, several mappings, limits, addresses;
    nothing changes after a refusal. Then under a :class:`~ramblock.GuestMemory`, with random
    conversions, virtio-mem, and calls that fail around it.

    :param make_target: Makes an empty target. It is called often, and each target is closed.
    :param device: Gives the device behind a target; then the bytes that it transfers are compared.
    :param reaches: Tells whether a device can write at an IOVA, where there is no more to be had.
        Without either only the target's answers are judged.
    :param reuse: *make_target* returns one and the same target, because there can only be one (real
        hardware). It is emptied, never closed.
    :param examples: How many random sequences; None: the current profile of Hypothesis says.
    :raises AssertionError: It does not; the text tells the steps. A target may be left unclosed.
    """
    bench = _Bench(make_target, device, reaches, reuse=reuse)
    bench.check_capabilities()
    bench.check_refusals()
    bench.check_limit()
    explore(st.tuples(steps(), st.booleans()), bench.check_steps, examples)
    if not reuse:
        bench.check_close()
    check_guest(bench.opened_for_a_guest, examples)


class _Place(NamedTuple):
    base: int
    pages: int
    """How many fit from there on."""


class _Bench(Generic[T]):
    """A way to make targets, and to look behind them."""

    def __init__(
        self,
        make_target: Callable[[], T],
        device: Callable[[T], Device] | None,
        reaches: Callable[[T, int], bool] | None,
        *,
        reuse: bool,
    ) -> None:
        self._make_target = make_target
        self._device = device
        self._reaches = reaches
        self._reuse = reuse

    @contextmanager
    def opened(self, *, anonymous: bool = False) -> Iterator[TargetPlayer]:
        """Give a new target under a player; afterwards it is empty and, unless reused, closed."""
        target = self._make_target()
        story = Story(type(target).__name__)
        place = _place(target.capabilities, story)
        player = TargetPlayer(target, self._view(target), story, place.base, anonymous=anonymous)
        try:
            yield player
            player.unmap_all()
        except BaseException:
            # For the next example; the story has been told.
            player.abandon()
            if not self._reuse:
                with suppress(Exception):
                    target.close()
            raise
        if not self._reuse:
            with story.no_error("close"):
                target.close()
        player.close()

    @contextmanager
    def opened_for_a_guest(self) -> Iterator[tuple[DmaTarget, View, int]]:
        """Give a new target, what can be seen of it, and where a guest can be."""
        target = self._make_target()
        place = _place(target.capabilities, Story(type(target).__name__))
        try:
            yield target, self._view(target), place.base
        finally:
            if not self._reuse:
                target.close()

    def _view(self, target: T) -> View:
        device, reaches = self._device, self._reaches
        return View(
            None if device is None else device(target),
            None if reaches is None else lambda iova: reaches(target, iova),
        )

    # -- what holds for any target ----------------------------------------------------------------

    def check_capabilities(self) -> None:
        """Check that they say something that can be meant, and go on saying it."""
        with self.opened() as player:
            before = player.target.capabilities
            player.play(Step(map=True, first=0, count=2))
            if player.target.capabilities != before:
                player.story.fail(f"its capabilities changed from {before!r}")

    def check_steps(self, example: tuple[list[Step], bool]) -> None:
        """Play steps, then look."""
        todo, anonymous = example
        with self.opened(anonymous=anonymous) as player:
            for step in todo:
                player.play(step)
            player.look()

    def check_refusals(self) -> None:
        """Check maps that cannot be: EINVAL, and nothing changes."""
        with self.opened() as player:
            player.play(Step(map=True, first=0, count=2))
            for iova, memory in _bad_maps(player):
                size = memory.size
                where = describe_range(iova, size)
                player.story.step(f"map {where}, which is not made of pages or out of range")
                answer = player.map(iova, memory)
                if not isinstance(answer, DmaError) or answer.errno != errno.EINVAL:
                    player.story.fail(f"it answered {answer!r}, expected DmaError with EINVAL")
                player.look()

    def check_limit(self) -> None:
        """Check that there is room for all it says, and not for more."""
        with self.opened() as player:
            limit = player.target.capabilities.max_mappings
            place = _place(player.target.capabilities, player.story)
            if limit is None or limit > min(_MOST_ENTRIES, place.pages // 2 - 1):
                return
            size = player.page_size
            # Not side by side: nobody may take two of them for one.
            iovas = [player.base + 2 * number * size for number in range(limit + 1)]
            player.story.step(f"map {limit + 1} single pages, with gaps")
            for number, iova in enumerate(iovas):
                answer = player.map(iova, player.memory(0))
                full = isinstance(answer, DmaError) and answer.errno == errno.ENOSPC
                if number < limit and answer is not None:
                    player.story.fail(f"map number {number + 1} answered {answer!r}")
                if number == limit and not full:
                    player.story.fail(
                        f"map number {limit + 1} answered {answer!r}, expected DmaError with ENOSPC"
                    )
            for iova in iovas[:limit]:
                answer = player.unmap(iova, size)
                if answer != size:
                    player.story.fail(f"unmap of {iova:#x} answered {answer!r}, expected {size:#x}")

    def check_close(self) -> None:
        """Check that closing unmaps."""
        target = self._make_target()
        story = Story(type(target).__name__)
        view = self._view(target)
        base = _place(target.capabilities, story).base
        player = TargetPlayer(target, view, story, base, anonymous=False)
        player.play(Step(map=True, first=0, count=2))
        story.step("close")
        with story.no_error("close"):
            target.close()
        player.model.apply(Step(map=False, first=0, count=2))
        player.look()
        player.close()


def _problem_of(capabilities: DmaCapabilities) -> str | None:
    size, limit = capabilities.page_size, capabilities.max_mappings
    if type(size) is not int or size < 1 or size & (size - 1):
        return "page_size is no power of two"
    if limit is not None and (type(limit) is not int or limit < 1):
        return "max_mappings is neither None nor positive"
    if capabilities.cut and capabilities.exact:
        return "what wants whole mappings (exact) cannot cut"
    end = 0
    for start, stop in capabilities.iova_ranges or ():
        if not end <= start < stop <= ADDRESS_LIMIT:
            return "iova_ranges are not ascending, disjoint, half-open and below 2**64"
        end = stop
    return None


def _place(capabilities: DmaCapabilities, story: Story) -> _Place:
    """Find room for the steps; the usual place, if it is free."""
    problem = _problem_of(capabilities)
    if problem is not None:
        story.fail(f"{capabilities!r}: {problem}")
    unit = max(capabilities.page_size, PAGE_SIZE)
    ranges = capabilities.iova_ranges
    places = []
    for start, end in ((0, ADDRESS_LIMIT),) if ranges is None else ranges:
        low = _USUAL_BASE if start <= _USUAL_BASE < end else -(-start // unit) * unit
        places.append(_Place(low, (end - low) // unit))
    best = max(places, key=lambda place: (place.base == _USUAL_BASE, place.pages), default=None)
    if best is None or best.pages < PAGES:
        story.fail(f"no {PAGES} pages of {unit:#x} bytes fit into {ranges!r}")
    return best


def _bad_maps(player: TargetPlayer) -> Iterator[tuple[int, HostRange]]:
    size, base = player.page_size, player.base
    page = player.memory(0)
    if size > 1:
        yield base + 4 * size + size // 2, page
        yield base + 4 * size, page._replace(size=size + size // 2)
    yield ADDRESS_LIMIT - size, player.memory(0, 2)
    ranges = player.target.capabilities.iova_ranges or ()
    edges = {edge for pair in ranges for edge in pair} - {0, ADDRESS_LIMIT}
    for edge in sorted(edges):
        # Half inside and half outside, whichever side that is.
        first = edge // size * size - size
        if 0 <= first <= ADDRESS_LIMIT - 2 * size:
            yield first, player.memory(0, 2)
