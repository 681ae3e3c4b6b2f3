# SPDX-License-Identifier: Apache-2.0
"""
The promises, the measurements, and whether they hold.

For people: nothing fails because a machine was slow.

Times are best deciles of CPU time, but for the wait of eight threads, which is wall clock. A
conversion in a promise without a direction is the mean of both: there and back, by two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cases import (
    checkerboard,
    main_thread,
    policy,
    replay,
    sections,
    startup,
    state_change,
    threads,
    whole_check,
)
from harness.ours import OURS
from ramblock.units import GIB, KIB, MIB, TIB, format_size
from report.results import Results

__all__ = ["Promise", "promises"]

_BITMAP = "C bitmap"

# Python takes memory from the kernel in arenas of this size (Objects/obmalloc.c, ARENA_BITS): less
# is nothing.
_ARENA = 1 << 20


class Promise(NamedTuple):
    """One line of the last table."""

    what: str
    promised: str
    measured: str
    holds: bool | None
    """None: it was not measured."""

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "yes", False: "NO", None: "-"}[self.holds]


def promises(results: Results) -> list[Promise]:
    """Compare *results* with what was promised."""
    return [
        *_size_of_the_guest(results),
        *_cost_of_a_change(results),
        *_sections(results),
        *_threads(results),
        *_calls(results),
        *_replay(results),
        *_start_up(results),
        *_check(results),
    ]


def _at_most(what: str, limit: float, value: float | None, unit: str, scale: float = 1) -> Promise:
    promised = f"at most {limit:g}{unit}"
    if value is None:
        return Promise(what, promised, "not measured", None)
    return Promise(what, promised, f"{_three_digits(value / scale)}{unit}", value / scale <= limit)


def _at_least(what: str, limit: float, aim: str, value: float | None) -> Promise:
    promised = f"at least {limit:g} times{aim}"
    if value is None:
        return Promise(what, promised, "not measured", None)
    return Promise(what, promised, f"{_three_digits(value)} times", value >= limit)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _size_of_the_guest(results: Results) -> Iterator[Promise]:
    ours = {size: results.conversion(4 * KIB, size, OURS) for size in state_change.VM_SIZES}
    yield _at_most(
        "4 KiB, 16 TiB guest against 1 GiB", 1.5, _ratio(ours[16 * TIB], ours[GIB]), " times"
    )
    for vm_size, limit, aim in (
        (64 * GIB, 1, ""),
        (TIB, 50, " (aim: 100)"),
        (16 * TIB, 1, ""),
    ):
        theirs = results.conversion(4 * KIB, vm_size, _BITMAP)
        yield _at_least(
            f"4 KiB, {format_size(vm_size)} guest, faster than the bitmap in C",
            limit,
            aim,
            _ratio(theirs, ours[vm_size]),
        )


def _cost_of_a_change(results: Results) -> Iterator[Promise]:
    for size in (4 * KIB, 2 * MIB, GIB):
        value = results.conversion(size, 16 * TIB, OURS)
        yield _at_most(f"state change of {format_size(size)}, one listener", 10, value, " µs", 1e3)
    value = results.figure(checkerboard.CASE, {"to": "private"}, OURS)
    yield _at_most("1 GiB checkerboard to private", 100, value, " µs", 1e3)


def _sections(results: Results) -> Iterator[Promise]:
    one, thousand = (
        results.both_ways(sections.CASE, {}, sections.contender(count)) for count in (1, 1_000)
    )
    yield _at_most(
        "convert 4 KiB, 1,000 sections against one", 1.3, _ratio(thousand, one), " times"
    )


def _threads(results: Results) -> Iterator[Promise]:
    longest = results.fact(threads.WAITS_CASE, {"threads": threads.EIGHT}, threads.LONGEST)
    promise = _at_most("eight threads, longest wait against the median", 20, longest, " times")
    eight, one = (
        results.fact(threads.WAITS_CASE, {"threads": count}, threads.WINDOW)
        for count in (threads.EIGHT, threads.ONE)
    )
    if eight is not None and one is not None:
        # Wall clock: a thread that nobody keeps waiting shows how much of it the machine is.
        waits = f"; {_three_digits(eight / 1e3)} ms, one alone {_three_digits(one / 1e3)} ms"
        promise = promise._replace(measured=promise.measured + waits)
    yield promise
    main, other = (
        results.both_ways(main_thread.CASE, {}, name)
        for name in (main_thread.MAIN, main_thread.OTHER)
    )
    yield _at_most(
        "convert 4 KiB, main thread against another", 1.05, _ratio(main, other), " times"
    )


def _calls(results: Results) -> Iterator[Promise]:
    for what, parameters in (
        ("1 GiB to shared, target that cuts", {"what": "1 GiB", "to": "shared"}),
        ("1 GiB checkerboard to private, the same", {"what": policy.BOARD}),
    ):
        yield _at_most(what, 1, results.fact(policy.CASE, parameters, "run calls"), " call")


def _replay(results: Results) -> Iterator[Promise]:
    where = {"shared": replay.TEN_RUNS}
    value = results.figure(replay.CASE, where, OURS)
    yield _at_most("replay of ten runs in 16 TiB", 20, value, " ms", 1e6)
    for what in ("resident by replay", "resident by creation"):
        gained = results.fact(replay.CASE, where, what)
        measured = "not measured" if gained is None else f"{gained / KIB:.0f} KiB"
        holds = None if gained is None else gained < _ARENA
        name = "replay of it" if what.endswith("replay") else "creation of 16 TiB"
        yield Promise(f"resident memory gained by {name}", "none", measured, holds)


def _start_up(results: Results) -> Iterator[Promise]:
    for what, limit in ((startup.IMPORT, 60), (startup.HELP, 150)):
        value = results.figure(startup.CASE, {"what": what}, OURS)
        yield _at_most(what, limit, value, " ms", 1e6)


def _check(results: Results) -> Iterator[Promise]:
    small = results.figure(whole_check.CASE, {"what": whole_check.SMALL}, whole_check.CHECK)
    yield _at_most(f"{whole_check.CHECK}, {whole_check.SMALL}", 150, small, " ms", 1e6)
    alone, drawn = (
        results.figure(whole_check.CASE, {"what": whole_check.REPORT}, what)
        for what in (whole_check.CHECK, whole_check.REPORT)
    )
    yield _at_most("the same with --report, against without", 1.5, _ratio(drawn, alone), " times")
