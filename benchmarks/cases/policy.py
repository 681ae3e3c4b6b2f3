# SPDX-License-Identifier: Apache-2.0
"""
One mapping per page against one per run: calls to the target, and their cost.

On a real iommufd this is a matter of the lab, which is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.measure import timed
from harness.ours import IdleTarget, confidential_block, share_checkerboard
from harness.rows import Row, Samples
from ramblock import ConversionResult, GuestMemory, MappingPolicy, PageState
from ramblock.dma import SoftIommu
from ramblock.units import GIB, MIB, format_size

__all__ = ["BOARD", "CASE", "run"]

CASE = "mapping policy: calls and time"
BOARD = "1 GiB checkerboard"

# What the policies are called in the columns; the facts are called after them.
_POLICIES = {"run": MappingPolicy.RUN, "page": MappingPolicy.PAGE}
_STATES = PageState.SHARED, PageState.PRIVATE
_TARGETS: dict[str, type[SoftIommu] | type[IdleTarget]] = {
    "software IOMMU": SoftIommu,
    "idle": IdleTarget,
}


def run(context: Context) -> Iterator[Row]:
    """Yield two rows per size and target, and one for the checkerboard."""
    context.say(CASE)
    for name, kind in _TARGETS.items():
        for size in (64 * MIB, 256 * MIB, GIB):
            if size < GIB or kind is IdleTarget:
                yield from _uniform(context, size, name, kind)
    yield _board(context)


def _uniform(
    context: Context, size: int, name: str, kind: type[SoftIommu] | type[IdleTarget]
) -> Iterator[Row]:
    samples = {state: Samples() for state in _STATES}
    calls: dict[PageState, dict[str, int]] = {state: {} for state in _STATES}
    for policy, value in _POLICIES.items():
        with confidential_block(size) as block:
            memory = GuestMemory()
            memory.map(block, 0)
            memory.attach(kind(), value)
            for to in _STATES:
                calls[to][policy] = _calls(memory.convert(0, size, to))
            for _ in range(context.choose(1, 9)):
                for to in _STATES:
                    samples[to].add(policy, [timed(memory.convert, 0, size, to)])
    for to in _STATES:
        yield samples[to].row(
            CASE,
            {"what": format_size(size), "target": name, "to": to.value},
            facts={f"{policy} calls": count for policy, count in calls[to].items()},
        )


def _board(context: Context) -> Row:
    """Convert a checkerboard to private under one mapping per run."""
    samples = Samples()
    calls = 0
    with confidential_block(GIB) as block:
        memory = GuestMemory()
        memory.map(block, 0)
        for _ in range(context.choose(1, 9)):
            # Before there is a target, and as states alone: the board is not measured.
            share_checkerboard(block, GIB)
            mapper = memory.attach(IdleTarget(), MappingPolicy.RUN)
            before = mapper.unmap_calls
            samples.add("run", [timed(memory.convert, 0, GIB, PageState.PRIVATE)])
            calls = mapper.unmap_calls - before
            memory.detach(mapper)
    return samples.row(
        CASE,
        {"what": BOARD, "target": "idle", "to": "private"},
        facts={"run calls": calls},
    )


def _calls(result: ConversionResult) -> int:
    return result.map_calls + result.unmap_calls
