# SPDX-License-Identifier: Apache-2.0
"""
One conversion of 4 KiB to 1 GiB, both ways, in guests of 1 GiB to 16 TiB, beside the programs in C.

Ours is a state change with one listener that records; so are theirs, with a listener that counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.ours import (
    OURS,
    RecordingListener,
    SystemCallListener,
    confidential_block,
    expect,
    replay,
)
from harness.requests import Pattern, RequestList, conversions
from harness.rows import Row, Samples
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE, TIB, format_size

__all__ = ["CASE", "SIZES", "SYSTEM_CALLS_CASE", "VM_SIZES", "run"]

CASE = "state change + one listener"
SYSTEM_CALLS_CASE = "state change, each map and unmap a system call"

SIZES = (4 * KIB, 64 * KIB, 2 * MIB, GIB)

# Pairs of conversions per run of a program: the search of the bitmap takes milliseconds in the big
# ones.
VM_SIZES = {GIB: 64, 64 * GIB: 32, TIB: 16, 16 * TIB: 8}
_SYSTEM_CALLS_VM = {64 * GIB: 24}

_WHY_SLOWER = (
    "the search finds something at once, or there is none: what is left is a few instructions of C"
    " against the interpreted code of a transaction that can be undone"
)

# Ours takes short turns, and several for one of a program in C, which has to be started for each
# and to read its bitmap.
_OUR_TURNS = 3
_OUR_REQUESTS = 160


def run(context: Context) -> Iterator[Row]:
    """
    Yield a row per size, guest, pattern and direction.

    All of them take turns: a machine's moods last for seconds, longer than all turns of one row.
    """
    kinds = [
        *((CASE, pattern, size, VM_SIZES) for pattern in Pattern for size in SIZES),
        *((SYSTEM_CALLS_CASE, Pattern.NOTHING, size, _SYSTEM_CALLS_VM) for size in SIZES),
    ]
    contenders = [
        _Contenders(context, case, pattern, size, requests)
        for case, pattern, size, vm_sizes in kinds
        for requests in _lists(vm_sizes, size, pattern)
    ]
    for index in range(context.rounds):
        context.say(f"{CASE}, round {index + 1} of {context.rounds}")
        for _ in range(_OUR_TURNS):
            for contender in contenders:
                contender.measure_ours()
        for contender in contenders:
            contender.measure_baselines()
    for contender in contenders:
        yield from contender.rows()


def _lists(vm_sizes: dict[int, int], size: int, pattern: Pattern) -> list[RequestList]:
    made = (
        conversions(vm_size // PAGE_SIZE, size, pattern, pairs)
        for vm_size, pairs in vm_sizes.items()
    )
    return [requests for requests in made if requests is not None]


class _Contenders:
    """Ours and the baselines on one list of requests."""

    def __init__(
        self, context: Context, case: str, pattern: Pattern, size: int, requests: RequestList
    ) -> None:
        self._case = case
        self._parameters = {
            "size": format_size(size),
            "VM": format_size(requests.pages * PAGE_SIZE),
            "else shared": pattern.value,
        }
        self._requests = requests
        self._baselines = context.baselines
        self._system_calls = case == SYSTEM_CALLS_CASE
        self._expected = expect(requests)
        name = f"requests-{self._system_calls}-{pattern.name}-{size}-{requests.pages}"
        self._file = requests.write(context.folder / name)
        self._samples = {"shared": Samples(), "private": Samples()}

    def measure_ours(self) -> None:
        """Let ours have a turn."""
        requests = self._requests
        listener = SystemCallListener() if self._system_calls else RecordingListener()
        with confidential_block(requests.pages * PAGE_SIZE, listener) as block:
            passes = max(1, _OUR_REQUESTS // len(requests.requests))
            self._add(OURS, replay(block, requests, passes=passes))

    def measure_baselines(self) -> None:
        """Let each program in C have a turn, and check what it did."""
        requests = self._requests
        for baseline in self._baselines:
            outcome = baseline.run(self._file, system_calls=self._system_calls)
            self._expected.compare(outcome, baseline, requests)
            self._add(baseline.name, outcome.times)

    def _add(self, contender: str, times: list[float]) -> None:
        sides = self._requests.split(times)
        for samples, side in zip(self._samples.values(), sides, strict=True):
            samples.add(contender, side)

    def rows(self) -> Iterator[Row]:
        """Yield a row for each direction."""
        for to, samples in self._samples.items():
            yield samples.row(self._case, {**self._parameters, "to": to}, note=_WHY_SLOWER)
