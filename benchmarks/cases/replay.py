# SPDX-License-Identifier: Apache-2.0
"""
A device is plugged: a new listener is told what is shared in 16 TiB, in ten runs or in 131,072.

Told with it: what memory becomes resident by making such a block, by sharing the runs, and by the
replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from harness.context import Context
from harness.measure import resident_bytes, timed
from harness.ours import (
    OURS,
    RecordingListener,
    confidential_block,
    expect_shared,
    share_checkerboard,
    whole,
)
from harness.requests import RequestList, shared_runs
from harness.rows import Row, Samples
from ramblock import PageState, RamBlock
from ramblock.units import GIB, MIB, PAGE_SIZE, TIB

__all__ = ["CASE", "FRAGMENTED", "TEN_RUNS", "run"]

CASE = "replay of a 16 TiB block to a new listener"
TEN_RUNS, FRAGMENTED = "ten runs", "131,072 runs in 1 GiB"

_SIZE = 16 * TIB

_WHY_SLOWER = "131,072 runs, each a call of a listener in Python"


def ten_runs() -> list[tuple[int, int]]:
    """Spread ten runs of 2 MiB over the block, as (offset, size)."""
    return [(index * _SIZE // 10 // MIB * MIB, 2 * MIB) for index in range(10)]


def run(context: Context) -> Iterator[Row]:
    """Yield a row per pattern."""
    context.say(CASE)
    pages = [(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE) for offset, size in ten_runs()]
    yield _row(context, TEN_RUNS, _share_ten, shared_runs(_SIZE // PAGE_SIZE, pages))
    # Highest first: so the programs in C find the next set bit at once while the board is made.
    board = [(page, page + 1) for page in range(GIB // PAGE_SIZE - 2, -1, -2)]
    requests = shared_runs(_SIZE // PAGE_SIZE, board)
    yield _row(context, FRAGMENTED, partial(share_checkerboard, size=GIB), requests)


def _share_ten(block: RamBlock) -> None:
    assert block.attributes is not None
    for offset, size in ten_runs():
        block.attributes.state_change(offset, size, PageState.SHARED)


def _row(
    context: Context, name: str, prepare: Callable[[RamBlock], None], requests: RequestList
) -> Row:
    file = requests.write(context.folder / "replay")
    samples = Samples()
    facts: dict[str, float] = {}
    # The board takes its time, most of all with bytes in C.
    for _ in range(1 if context.quick and name == FRAGMENTED else context.rounds):
        before = resident_bytes()
        with confidential_block(_SIZE) as block:
            created = resident_bytes()
            prepare(block)
            shared = resident_bytes()
            expected = expect_shared(block, requests)
            samples.add(OURS, _replays(context, block, facts))
        facts.setdefault("resident by creation", created - before)
        facts.setdefault("resident by sharing", shared - created)
        for baseline in context.baselines:
            outcome = baseline.run(file, replays=1)
            expected.compare(outcome, baseline, requests)
            samples.add(baseline.name, outcome.replays)
    return samples.row(CASE, {"shared": name}, facts=facts, note=_WHY_SLOWER)


def _replays(context: Context, block: RamBlock, facts: dict[str, float]) -> list[float]:
    manager, section = block.discard_manager, whole(block)
    times = []
    before = resident_bytes()
    for _ in range(context.choose(1, 3)):
        listener = RecordingListener()
        times.append(timed(manager.register_listener, listener, section))
        manager.unregister_listener(listener)
        # What it noted is the listener's own.
        listener.clear()
    facts.setdefault("resident by replay", resident_bytes() - before)
    return times
