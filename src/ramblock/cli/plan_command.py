# SPDX-License-Identifier: Apache-2.0
"""
``ramblock plan``: options, the plan of a guest or of a recording.

Sweeps have a module of their own.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import IO

import msgspec

from ramblock.check.readers import ReaderOptions
from ramblock.cli.outputs import open_page, refuse_shared
from ramblock.cli.plan_guest import guest_of, limits_of
from ramblock.cli.plan_summary import print_guest_plan, print_trace_plan
from ramblock.cli.progress import counting
from ramblock.cli.terminal import out
from ramblock.dma.target import MappingPolicy
from ramblock.errors import UsageError
from ramblock.plan.guest_plan import plan_guest
from ramblock.plan.page import write_guest_plan, write_trace_plan
from ramblock.plan.targets import POLICIES, TARGETS
from ramblock.plan.trace_plan import plan_trace
from ramblock.plan.workload import End

__all__ = ["start"]

_EXIT_CANNOT_TELL = 4

# Options that describe a guest, and so say nothing of a recording.
_OF_A_GUEST = (
    "memory", "vcpus", "numa", "device", "os", "tee", "backing", "conversions", "rate", "simulate",
    "seed", "sweep", "table", "jobs", "scheduler", "virtio_mem", "memlock", "cgroup", "memslots",
)  # fmt: skip


def start(arguments: argparse.Namespace) -> int:
    """Plan; return the exit code."""
    _check_usage(arguments)
    refuse_shared({"--plot": arguments.plot, "--table": arguments.table}, [arguments.trace])
    if arguments.sweep:
        from ramblock.cli.plan_sweep import start_sweep

        return start_sweep(arguments)
    with ExitStack() as stack:
        plot = (
            None
            if arguments.plot is None
            else stack.enter_context(open_page("--plot", arguments.plot))
        )
        if arguments.trace is None:
            return _plan_guest(arguments, plot)
        return _plan_trace(arguments, plot)


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.trace is not None:
        given = [name for name in _OF_A_GUEST if getattr(arguments, name) not in (None, [])]
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} with a recording",
                value=given,
                expected="a guest or a recording",
            )
    elif arguments.format is not None:
        raise UsageError("--format without a recording", value=arguments.format, expected="both")
    if arguments.sweep:
        if arguments.simulate is not None:
            raise UsageError(
                "--simulate with --sweep", expected="one of them: sweeps are by formula"
            )
    else:
        for name in ("table", "jobs", "scheduler"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} without --sweep", expected="both")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}", value=arguments.jobs, expected="at least 1")


def _plan_guest(arguments: argparse.Namespace, plot: IO[bytes] | None) -> int:
    end = None if arguments.simulate is None else End(arguments.simulate)
    if end is None and arguments.plot is not None:
        end = End.EXPECTED
    policies = POLICIES if arguments.policy is None else (MappingPolicy(arguments.policy),)
    targets = [each for each in TARGETS if arguments.target in (None, each.name)]
    guest, limits = guest_of(arguments), limits_of(arguments)
    with counting("conversions", quiet=arguments.quiet) as progress:
        plan = plan_guest(
            guest,
            limits,
            policies=policies,
            targets=targets,
            end=end,
            seed=1 if arguments.seed is None else arguments.seed,
            progress=progress,
        )
    if plot is not None:
        write_guest_plan(plot, plan)
    if arguments.json:
        out().json("ramblock.plan", 1, msgspec.to_builtins(plan))
    else:
        print_guest_plan(plan)
    return int(plan.hopeless)


def _plan_trace(arguments: argparse.Namespace, plot: IO[bytes] | None) -> int:
    options = ReaderOptions(format=arguments.format)
    with counting("events and conversions", quiet=arguments.quiet) as progress:
        plan = plan_trace(arguments.trace, limits_of(arguments), options, progress)
    plan.rows = [
        each
        for each in plan.rows
        if arguments.policy in (None, each.policy) and arguments.target in (None, each.target)
    ]
    if plot is not None:
        write_trace_plan(plot, plan)
    if arguments.json:
        fields = {"cannot_tell": plan.cannot_tell, **msgspec.to_builtins(plan)}
        out().json("ramblock.plan-trace", 1, fields)
    else:
        print_trace_plan(plan)
    return _EXIT_CANNOT_TELL if plan.cannot_tell else int(plan.hopeless)
