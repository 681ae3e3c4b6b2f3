# SPDX-License-Identifier: Apache-2.0
"""
1 GiB in which every other page is shared, made uniform: the worst mixture that a guest can present.

To private, a listener that is content with one discard for the whole range (a mapper on a target
that cuts) hears one call; one that wants exact runs hears 131,072. To shared there are 131,072
pages to map, whoever does it.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.measure import timed
from harness.ours import (
    OURS,
    RecordingListener,
    SparseListener,
    confidential_block,
    expect,
    share_checkerboard,
    whole,
)
from harness.requests import checkerboard
from harness.rows import Row, Samples
from ramblock import PageState, RamBlock
from ramblock.units import GIB, MIB, PAGE_SIZE

__all__ = ["CASE", "run"]

CASE = "checkerboard of 1 GiB made uniform"

_EXACT = "ramblock, exact runs"
_LISTENERS = {OURS: SparseListener, _EXACT: RecordingListener}

# To private costs so little that one sample a round would say nothing; but each needs a new board.
_QUICK_SAMPLES, _SAMPLES = 3, 5

# Small mixtures that are converted before the big one.
_WARM_UP = 10

_WHY_SLOWER = "131,072 runs, each a call of a listener in Python; to C a run is a few instructions"


def run(context: Context) -> Iterator[Row]:
    """Yield a row per direction."""
    context.say(CASE)
    requests = checkerboard(GIB // PAGE_SIZE)
    expected = expect(requests)
    file = requests.write(context.folder / "checkerboard")
    to_private, to_shared = Samples(), Samples()
    for _ in range(context.choose(1, context.rounds)):
        for name, kind in _LISTENERS.items():
            private, shared = _ours(kind(), context.choose(_QUICK_SAMPLES, _SAMPLES))
            to_private.add(name, private)
            to_shared.add(name, shared)
        for baseline in context.baselines:
            outcome = baseline.run(file)
            expected.compare(outcome, baseline, requests)
            shared, private = requests.split(outcome.times)
            to_private.add(baseline.name, private)
            to_shared.add(baseline.name, shared)
    for to, samples in (("private", to_private), ("shared", to_shared)):
        yield samples.row(CASE, {"to": to}, note=_WHY_SLOWER)


def _ours(listener: RecordingListener, samples: int) -> tuple[list[float], list[float]]:
    """Time some conversions of the board to private, and one to shared."""
    if not isinstance(listener, SparseListener):
        samples = 1  # it takes long enough
    to_private = [_uniform(listener, PageState.PRIVATE) for _ in range(samples)]
    return to_private, [_uniform(listener, PageState.SHARED)]


def _uniform(listener: RecordingListener, to: PageState) -> float:
    warm = type(listener)()
    with confidential_block(GIB) as block, confidential_block(MIB, warm) as small:
        # Before there is a listener: it would note every page, and when it forgets them, Python
        # gives memory back to the kernel piece by piece, a piece of it in the middle of the call
        # that is timed.
        share_checkerboard(block, GIB)
        block.discard_manager.register_listener(listener, whole(block))
        listener.clear()
        # After so much else the first call of its kind would take three times as long.
        for _ in range(_WARM_UP):
            share_checkerboard(small, small.size)
            _change(small, to)
            warm.clear()
        return timed(_change, block, to)


def _change(block: RamBlock, to: PageState) -> None:
    assert block.attributes is not None
    block.attributes.state_change(0, block.size, to)
