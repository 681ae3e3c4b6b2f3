# SPDX-License-Identifier: Apache-2.0
"""Our side of a comparison: a block with a listener, replayed requests, and what the baselines have to agree with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter_ns

from harness.baselines import Baseline, Outcome
from harness.measure import CLOCK
from harness.requests import RequestList
from ramblock import PageState, RamBlock, RamSection
from ramblock.bitmap import SavedBits
from ramblock.dma import DmaCapabilities, HostRange
from ramblock.memory import Listener
from ramblock.units import GIB, PAGE_SIZE

__all__ = [
    "OURS",
    "Expected",
    "IdleTarget",
    "RecordingListener",
    "Snapshot",
    "SparseListener",
    "SystemCallListener",
    "checkerboard_states",
    "confidential_block",
    "expect",
    "expect_shared",
    "replay",
    "whole",
]

#: Our name in the tables.
OURS = "ramblock"


class RecordingListener:
    """Notes what it hears. It wants exact runs."""

    def __init__(self) -> None:
        self.populated: list[RamSection] = []
        self.discarded: list[RamSection] = []

    def notify_populate(self, section: RamSection) -> None:
        """Note it."""
        self.populated.append(section)

    def notify_discard(self, section: RamSection) -> None:
        """Note it."""
        self.discarded.append(section)

    def clear(self) -> None:
        """Forget everything."""
        self.populated.clear()
        self.discarded.clear()


class SparseListener(RecordingListener):
    """The same, content with one discard for all of a mixed range: as a mapper on a target that cuts."""

    sparse_discard = True


class SystemCallListener:
    """Goes to the kernel and back at each call, like the baselines' second kind of callback."""

    sparse_discard = True

    def notify_populate(self, section: RamSection) -> None:
        """Make the call that a map would make."""
        os.getppid()

    def notify_discard(self, section: RamSection) -> None:
        """Make the call that an unmap would make."""
        os.getppid()


class IdleTarget:
    """A DMA target that maps nothing: what remains is the cost of what drives it."""

    def __init__(self, *, cut: bool = True) -> None:
        self.capabilities = DmaCapabilities(cut=cut)

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """Claim success."""

    def unmap(self, iova: int, size: int) -> int:
        """Claim success."""
        return size

    def close(self) -> None:
        """Do nothing."""


def whole(block: RamBlock) -> RamSection:
    """Name all of *block*."""
    return RamSection(block, 0, block.size)


@contextmanager
def confidential_block(size: int, *listeners: Listener) -> Iterator[RamBlock]:
    """Make an all-private block with *listeners* for all of it."""
    with RamBlock.create("ram", size, private="stand-in") as block:
        for listener in listeners:
            block.discard_manager.register_listener(listener, whole(block))
        yield block


def replay(block: RamBlock, requests: RequestList, *, passes: int = 1) -> list[float]:
    """Make the requests; return what the timed ones took, in order, in nanoseconds."""
    assert block.attributes is not None
    calls = [
        (
            request.start * PAGE_SIZE,
            (request.end - request.start) * PAGE_SIZE,
            PageState.SHARED if request.shared else PageState.PRIVATE,
            request.timed,
        )
        for request in requests.requests
    ] * passes
    change = block.attributes.state_change
    clock = perf_counter_ns
    times = []
    for offset, size, to, timed in calls:
        before = clock()
        change(offset, size, to)
        after = clock()
        if timed:
            times.append(max(after - before - CLOCK, 0))
    return times


@dataclass(slots=True)
class Expected:
    """What a program must answer that does the same as ours. Calls are those of one mapping per page."""

    maps: int = 0
    joined_unmaps: int = 0
    """One per run that our listener was told of."""
    page_unmaps: int = 0
    """The same, and in a mixture one per page."""
    runs: list[tuple[int, int]] | None = None
    """What is shared in the end, in pages, inside the windows."""

    def compare(self, outcome: Outcome, baseline: Baseline, requests: RequestList) -> None:
        """
        Compare it with what *baseline* answered.

        :raises AssertionError: It differs; then no time means anything.
        """
        unmaps = self.joined_unmaps if baseline.joins_unmaps else self.page_unmaps
        for what, theirs, ours in (
            ("map calls", outcome.maps, self.maps),
            ("unmap calls", outcome.unmaps, unmaps),
            ("shared runs", outcome.runs, self.runs),
        ):
            if theirs != ours:
                raise AssertionError(
                    f"{baseline.name} and ramblock disagree on {what} after"
                    f" {len(requests.requests)} requests in {requests.pages} pages: {theirs} != {ours}"
                )


def expect(requests: RequestList) -> Expected:
    """Make the requests with ours, untimed, and note what every other program has to come to."""
    expected = Expected()
    listener = RecordingListener()
    with confidential_block(requests.pages * PAGE_SIZE, listener) as block:
        attributes = block.attributes
        assert attributes is not None
        for start, end, shared, _ in requests.requests:
            to = PageState.SHARED if shared else PageState.PRIVATE
            attributes.state_change(start * PAGE_SIZE, (end - start) * PAGE_SIZE, to)
            told = listener.populated if shared else listener.discarded
            pages = sum(section.size for section in told) // PAGE_SIZE
            if shared:
                expected.maps += pages
            else:
                expected.joined_unmaps += len(told)
                expected.page_unmaps += len(told) if pages == end - start else pages
            listener.clear()
        expected.runs = _shared_runs(block, requests)
    return expected


def expect_shared(block: RamBlock, requests: RequestList) -> Expected:
    """Note the same of requests that do nothing but share what *block* has shared already."""
    assert block.attributes is not None
    maps = block.attributes.shared_bytes // PAGE_SIZE
    return Expected(maps=maps, runs=_shared_runs(block, requests))


def _shared_runs(block: RamBlock, requests: RequestList) -> list[tuple[int, int]]:
    assert block.attributes is not None
    return [
        (offset // PAGE_SIZE, (offset + size) // PAGE_SIZE)
        for low, high in requests.windows
        for offset, size in block.attributes.ranges(low * PAGE_SIZE, (high - low) * PAGE_SIZE)
    ]


class Snapshot:
    """
    The page states of a block, to be put into another without telling anybody.

    For states that take a hundred thousand conversions to make. It reaches below the public interface, and only between
    measurements.
    """

    def __init__(self, block: RamBlock) -> None:
        assert block.attributes is not None
        self._pages = block.size // PAGE_SIZE
        self._bits: SavedBits = block.attributes.bits.save(0, self._pages)
        self._shared_bytes = block.attributes.shared_bytes

    def restore(self, block: RamBlock) -> None:
        """Make the first states of *block* those that were taken; all behind them is private."""
        assert block.attributes is not None
        block.attributes.bits.restore(0, self._pages, self._bits)
        block.attributes.populated_bytes = self._shared_bytes


@cache
def checkerboard_states() -> Snapshot:
    """Make 1 GiB of which every other page is shared."""
    with confidential_block(GIB) as block:
        assert block.attributes is not None
        for offset in range(0, GIB, 2 * PAGE_SIZE):
            block.attributes.state_change(offset, PAGE_SIZE, PageState.SHARED)
        return Snapshot(block)
