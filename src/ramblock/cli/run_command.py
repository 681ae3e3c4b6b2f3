# SPDX-License-Identifier: Apache-2.0
"""``ramblock run``: options over scenario, the job, the report."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ramblock.check import check_file, judge
from ramblock.cli.check_outputs import Outputs
from ramblock.cli.outputs import refuse_shared
from ramblock.cli.run_progress import RunProgress
from ramblock.cli.run_summary import print_summary
from ramblock.cli.terminal import out, print_error
from ramblock.errors import UsageError
from ramblock.run import Run, Scenario, load_scenario
from ramblock.run.scenario import Size, check_scenario
from ramblock.units import PAGE_SIZE

__all__ = ["start"]


def start(arguments: argparse.Namespace) -> int:
    """Run the job; return the exit code."""
    scenario = _scenario(arguments)
    refuse_shared(
        {"--trace": arguments.trace, "--report": arguments.report},
        [arguments.scenario, scenario.run.workload, *scenario.devices.sockets],
    )
    with (
        _trace_file(arguments) as trace,
        Outputs(arguments.report, None, "ramblock run") as outputs,
    ):
        return _run(scenario, arguments, trace, outputs)


@contextmanager
def _trace_file(arguments: argparse.Namespace) -> Iterator[Path | None]:
    """Say where the trace goes: a report needs one, whether anybody else wants it or not."""
    if arguments.report is None or arguments.trace is not None:
        yield arguments.trace
        return
    with tempfile.TemporaryDirectory(prefix="ramblock-run-") as folder:
        yield Path(folder) / "trace.jsonl"


def _run(
    scenario: Scenario, arguments: argparse.Namespace, trace: Path | None, outputs: Outputs
) -> int:
    try:
        run = Run(scenario, trace)
    except OSError as error:
        if Path(error.filename or "") != arguments.trace:
            raise
        raise UsageError(
            f"--trace {arguments.trace}: {error.strerror}", value=str(arguments.trace)
        ) from error
    with _ended_like_ctrl_c(), RunProgress(quiet=arguments.quiet) as progress:
        report = run.execute(progress)
    if arguments.json:
        out().json("ramblock.run", 1, report.as_dict())
    else:
        print_summary(report)
    if report.trace_error is not None:
        print_error(f"the trace is incomplete: {report.trace_error}")
    if arguments.report is not None and trace is not None:
        result = check_file(str(trace), observer=outputs.observer)
        outputs.finish(result, judge(result))
    return report.exit_code


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: the run frees its resources, above all devices bound to vfio-pci."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread has signal handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _scenario(arguments: argparse.Namespace) -> Scenario:
    try:
        scenario = Scenario() if arguments.scenario is None else load_scenario(arguments.scenario)
    except OSError as error:
        raise UsageError(
            f"{arguments.scenario}: {error.strerror}", value=str(arguments.scenario)
        ) from error
    guest, devices, run = scenario.guest, scenario.devices, scenario.run
    if arguments.memory is not None:
        if arguments.memory % PAGE_SIZE:
            raise UsageError(
                f"--memory {arguments.memory:#x}: not whole pages", value=arguments.memory
            )
        guest = msgspec.structs.replace(guest, memory=Size(arguments.memory))
    if arguments.devices is not None:
        if not 0 <= arguments.devices <= 64:
            raise UsageError(
                f"--devices {arguments.devices}", value=arguments.devices, expected="0 to 64"
            )
        devices = msgspec.structs.replace(devices, count=arguments.devices)
    if arguments.guest is not None:
        guest = msgspec.structs.replace(guest, kind=arguments.guest)
    if arguments.device is not None:
        devices = msgspec.structs.replace(devices, pci=arguments.device)
    if arguments.iommu is not None:
        kind, _, path = arguments.iommu.partition(":")
        devices = msgspec.structs.replace(devices, iommu=kind, sockets=[path] if path else [])
    for name in ("policy", "max_mappings"):
        if getattr(arguments, name) is not None:
            devices = msgspec.structs.replace(devices, **{name: getattr(arguments, name)})
    for name in ("workload", "conversions", "seed", "uncoordinated", "inject"):
        if getattr(arguments, name) is not None:
            run = msgspec.structs.replace(run, **{name: getattr(arguments, name)})
    scenario = Scenario(guest=guest, devices=devices, run=run)
    if devices.iommu != "soft" and arguments.devices is not None:
        raise UsageError(
            f"--devices {arguments.devices} with --iommu {devices.iommu}",
            value=arguments.devices,
            expected="one device for a socket, and real devices to be named by --device",
        )
    check_scenario(scenario, "command line")
    return scenario
