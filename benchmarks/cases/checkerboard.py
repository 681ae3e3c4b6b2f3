# SPDX-License-Identifier: Apache-2.0
"""
1 GiB in which every other page is shared, made uniform: the worst mixture that a guest can present.

To private, a listener that is content with one discard for the whole range (a mapper on a target that cuts) hears one
call; one that wants exact runs hears 131,072. To shared there are 131,072 pages to map, whoever does it.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.measure import Row, Summary, timed
from harness.ours import (
    OURS,
    RecordingListener,
    SparseListener,
    checkerboard_states,
    confidential_block,
    expect,
)
from harness.requests import checkerboard
from ramblock import PageState
from ramblock.units import GIB, PAGE_SIZE

__all__ = ["CASE", "run"]

CASE = "checkerboard of 1 GiB made uniform"

_EXACT = "ramblock, exact runs"
_LISTENERS = {OURS: SparseListener, _EXACT: RecordingListener}

# To private costs so little that one sample a round would say nothing.
_SAMPLES = 5

_WHY_SLOWER = "131,072 runs, each a call of a listener in Python; to C a run is a few instructions"


def run(context: Context) -> Iterator[Row]:
    """Yield a row per direction."""
    context.say(CASE)
    requests = checkerboard(GIB // PAGE_SIZE)
    expected = expect(requests)
    file = requests.write(context.folder / "checkerboard")
    to_private: dict[str, list[float]] = {}
    to_shared: dict[str, list[float]] = {}
    for index in range(context.rounds):
        for name, kind in _LISTENERS.items():
            if index and context.quick and name == _EXACT:
                continue  # it takes seconds
            private, shared = _ours(kind())
            to_private.setdefault(name, []).extend(private)
            to_shared.setdefault(name, []).extend(shared)
        for baseline in context.baselines:
            outcome = baseline.run(file)
            expected.compare(outcome, baseline, requests)
            shared, private = requests.split(outcome.times)
            to_private.setdefault(baseline.name, []).extend(private)
            to_shared.setdefault(baseline.name, []).extend(shared)
    for to, times in (("private", to_private), ("shared", to_shared)):
        yield Row(
            case=CASE,
            parameters={"to": to},
            results={name: Summary.of(samples) for name, samples in times.items()},
            note=_WHY_SLOWER,
        )


def _ours(listener: RecordingListener) -> tuple[list[float], list[float]]:
    """Time some conversions of the board to private, and one to shared."""
    board = checkerboard_states()
    with confidential_block(GIB, listener) as block:
        attributes = block.attributes
        assert attributes is not None
        to_private = []
        for _ in range(_SAMPLES if isinstance(listener, SparseListener) else 1):
            board.restore(block)
            to_private.append(timed(attributes.state_change, 0, GIB, PageState.PRIVATE))
        board.restore(block)
        listener.clear()
        to_shared = [timed(attributes.state_change, 0, GIB, PageState.SHARED)]
    return to_private, to_shared
