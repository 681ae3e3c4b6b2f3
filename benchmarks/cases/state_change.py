# SPDX-License-Identifier: Apache-2.0
"""
One conversion of 4 KiB to 1 GiB, both ways, in guests of 1 GiB to 16 TiB, beside the programs in C.

Ours is a state change with one listener that records; so are theirs, with a listener that counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.context import Context
from harness.measure import Row, Summary
from harness.ours import (
    OURS,
    RecordingListener,
    SystemCallListener,
    confidential_block,
    expect,
    replay,
)
from harness.requests import Pattern, RequestList, conversions
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE, TIB, format_size

__all__ = ["CASE", "SIZES", "SYSTEM_CALLS_CASE", "VM_SIZES", "run"]

CASE = "state change + one listener"
SYSTEM_CALLS_CASE = "state change, each map and unmap a system call"

SIZES = (4 * KIB, 64 * KIB, 2 * MIB, GIB)

# Pairs of conversions per run of a program: the search of the bitmap takes milliseconds in the big ones.
VM_SIZES = {GIB: 100, 64 * GIB: 40, TIB: 10, 16 * TIB: 3}
_SYSTEM_CALLS_VM = {64 * GIB: 10}

_WHY_SLOWER = (
    "the search finds something at once, or there is none: what is left is a few instructions of C against the"
    " interpreted code of a transaction that can be undone"
)

# How many requests ours makes in the same time.
_OUR_REQUESTS = 240


def run(context: Context) -> Iterator[Row]:
    """Yield a row per size, guest, pattern and direction."""
    for pattern in Pattern:
        for size in SIZES:
            context.say(f"state change of {format_size(size)}, else shared: {pattern.value}")
            lists = _lists(VM_SIZES, size, pattern)
            yield from _rows(context, CASE, lists, size, pattern)
    for size in SIZES:
        context.say(f"state change of {format_size(size)} with system calls")
        lists = _lists(_SYSTEM_CALLS_VM, size, Pattern.NOTHING)
        yield from _rows(context, SYSTEM_CALLS_CASE, lists, size, Pattern.NOTHING)


def _lists(vm_sizes: dict[int, int], size: int, pattern: Pattern) -> list[RequestList]:
    made = (
        conversions(vm_size // PAGE_SIZE, size, pattern, pairs)
        for vm_size, pairs in vm_sizes.items()
    )
    return [requests for requests in made if requests is not None]


def _rows(
    context: Context, case: str, lists: list[RequestList], size: int, pattern: Pattern
) -> Iterator[Row]:
    """
    Measure the lists and yield their rows.

    Guests of all sizes and all contenders take turns: a slow minute of the machine is everybody's.
    """
    contenders = [
        _Contenders(context, requests, system_calls=case == SYSTEM_CALLS_CASE) for requests in lists
    ]
    for _ in range(context.rounds):
        for contender in contenders:
            contender.measure()
    for contender in contenders:
        for to, results in contender.summaries():
            yield Row(
                case=case,
                parameters={
                    "size": format_size(size),
                    "VM": format_size(contender.requests.pages * PAGE_SIZE),
                    "else shared": pattern.value,
                    "to": to,
                },
                results=results,
                note=_WHY_SLOWER,
            )


class _Contenders:
    """Ours and the baselines on one list of requests."""

    def __init__(self, context: Context, requests: RequestList, *, system_calls: bool) -> None:
        self.requests = requests
        self._baselines = context.baselines
        self._system_calls = system_calls
        self._expected = expect(requests)
        self._file = requests.write(context.folder / f"requests-{requests.pages}")
        self._times: dict[str, list[float]] = {OURS: []}

    def measure(self) -> None:
        """Let each have a turn."""
        requests = self.requests
        listener = SystemCallListener() if self._system_calls else RecordingListener()
        with confidential_block(requests.pages * PAGE_SIZE, listener) as block:
            passes = max(1, _OUR_REQUESTS // len(requests.requests))
            self._times[OURS] += replay(block, requests, passes=passes)
        for baseline in self._baselines:
            outcome = baseline.run(self._file, system_calls=self._system_calls)
            self._expected.compare(outcome, baseline, requests)
            self._times.setdefault(baseline.name, []).extend(outcome.times)

    def summaries(self) -> Iterator[tuple[str, dict[str, Summary]]]:
        """Yield the two directions, and what each contender needed."""
        sides = {name: self.requests.split(times) for name, times in self._times.items()}
        for index, to in enumerate(("shared", "private")):
            yield to, {name: Summary.of(side[index]) for name, side in sides.items()}
