# SPDX-License-Identifier: Apache-2.0
"""Our side of a comparison: a block with a listener, replayed requests, expected answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from harness.baselines import Baseline, Outcome
from harness.measure import timed_each
from harness.requests import RequestList
from ramblock import GuestMemory, PageState, RamBlock, RamSection
from ramblock.dma import DmaCapabilities, HostRange
from ramblock.units import PAGE_SIZE

__all__ = [
    "OURS",
    "Expected",
    "IdleTarget",
    "Listener",
    "RecordingListener",
    "SparseListener",
    "SystemCallListener",
    "confidential_block",
    "confidential_guest",
    "expect",
    "expect_shared",
    "replay",
    "share_checkerboard",
    "whole",
]

#: Our name in the tables.
OURS = "ramblock"


class Listener(Protocol):
    """What a discard manager tells."""

    def notify_populate(self, section: RamSection) -> None:
        """Hear that *section* becomes usable."""

    def notify_discard(self, section: RamSection) -> None:
        """Hear that *section* is usable no more."""


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
    """Content with one discard for all of a mixed range, as a mapper on a target that cuts."""

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


@contextmanager
def confidential_guest(size: int, targets: int = 1) -> Iterator[GuestMemory]:
    """Make a guest of one all-private block at address 0, with *targets* idle targets."""
    with confidential_block(size) as block:
        memory = GuestMemory()
        memory.map(block, 0)
        for _ in range(targets):
            memory.attach(IdleTarget())
        yield memory


def replay(block: RamBlock, requests: RequestList, *, passes: int = 1) -> list[float]:
    """Make the requests; list the times of the timed groups, in nanoseconds per request."""
    assert block.attributes is not None
    change = block.attributes.state_change
    groups = [
        (group.timed, [(*request.span, _state(request.shared)) for request in group.requests])
        for group in requests.groups
    ] * passes
    times = []
    for timed, calls in groups:
        elapsed = timed_each(change, calls)
        if timed:
            times.append(elapsed)
    return times


def _state(shared: bool) -> PageState:  # noqa: FBT001
    return PageState.SHARED if shared else PageState.PRIVATE


@dataclass(slots=True)
class Expected:
    """The answers of a program that does the same. Calls are those of one mapping per page."""

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
        timed = sum(group.timed for group in requests.groups)
        for what, theirs, ours in (
            ("timed groups", len(outcome.times), timed),
            ("map calls", outcome.maps, self.maps),
            ("unmap calls", outcome.unmaps, unmaps),
            ("shared runs", outcome.runs, self.runs),
        ):
            if theirs != ours:
                raise AssertionError(
                    f"{baseline.name} and ramblock disagree on {what} after"
                    f" {len(requests.requests)} requests in {requests.pages} pages:"
                    f" {theirs} != {ours}"
                )


def expect(requests: RequestList) -> Expected:
    """Make the requests with ours, untimed, and note what every other program has to come to."""
    expected = Expected()
    listener = RecordingListener()
    with confidential_block(requests.pages * PAGE_SIZE, listener) as block:
        attributes = block.attributes
        assert attributes is not None
        for request in requests.requests:
            start, end, shared, _ = request
            attributes.state_change(*request.span, _state(shared))
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


def share_checkerboard(block: RamBlock, size: int) -> None:
    """Share every other page of the first *size* bytes of *block*, the first page too."""
    assert block.attributes is not None
    for offset in range(0, size, 2 * PAGE_SIZE):
        block.attributes.state_change(offset, PAGE_SIZE, PageState.SHARED)
