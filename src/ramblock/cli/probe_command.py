# SPDX-License-Identifier: Apache-2.0
"""``ramblock probe``: options, the server, a view until Ctrl-C, the summary."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import sleep

from ramblock.cli.outputs import refuse_shared
from ramblock.cli.probe_summary import print_summary, summary_fields
from ramblock.cli.probe_view import LiveView, NoView, PlainView
from ramblock.cli.terminal import err, out, print_error
from ramblock.errors import RamblockError, UsageError
from ramblock.probe import Probe, UnmapRule
from ramblock.probe.expectation import VirtioMemExpectation
from ramblock.trace import TraceWriter

__all__ = ["start"]

_FRAME_SECONDS = 0.25


def start(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code."""
    if (arguments.expect is None) is not (arguments.qmp is None):
        raise UsageError("--expect and --qmp belong together", expected="both, or none")
    refuse_shared({"--trace": arguments.trace}, [arguments.socket, arguments.qmp])
    with _open_trace(arguments) as trace:
        stream = TraceWriter(None, stream=sys.stdout.buffer if arguments.json else None)
        probe = Probe(
            arguments.socket,
            unmap=UnmapRule(arguments.unmap),
            touch=arguments.touch,
            scribble=arguments.scribble,
            trace=(trace, stream),
        )
        with _ended_by_signals():
            expectation = _serve(probe, arguments)
        probe.record.emit("summary", **summary_fields(probe.record))
        if probe.error is not None:
            raise RamblockError(f"the probe ended by an error of its own: {probe.error!r}")
    error = trace.error or stream.error
    incomplete = None if error is None else f"the trace is incomplete: {error}"
    # A comparison that never happened must not look like one that found nothing.
    if expectation is not None and not expectation.devices and probe.record.clients:
        incomplete = (
            f"nothing was compared: no virtio-mem device was seen over QMP at {arguments.qmp}"
        )
    if not arguments.json:
        print_summary(probe.record)
        if probe.record.clean and incomplete is None:
            out().line("Nothing found.")
    if incomplete is not None:
        print_error(incomplete)
    return 0 if probe.record.clean and incomplete is None else 1


def _serve(probe: Probe, arguments: argparse.Namespace) -> VirtioMemExpectation | None:
    """
    Show events until somebody ends it; then stop everything.

    Return the comparison.
    """
    expectation = None
    try:
        with suppress(KeyboardInterrupt):
            if arguments.expect is not None:
                expectation = VirtioMemExpectation(probe, arguments.qmp)
                expectation.start()
            probe.start()
            with _view(probe, expectation, arguments) as view:
                while probe.serving:
                    sleep(_FRAME_SECONDS)
                    view.update()
    finally:
        if expectation is not None:
            expectation.stop()
        probe.stop()
    return expectation


def _view(
    probe: Probe, expectation: VirtioMemExpectation | None, arguments: argparse.Namespace
) -> NoView | PlainView | LiveView:
    if arguments.quiet or arguments.json:
        return NoView()
    return LiveView(probe, expectation) if err().is_terminal else PlainView(probe)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """
    Take SIGTERM for Ctrl-C, which is the usual end.

    Also where a shell started us with Ctrl-C ignored.
    """
    before = [
        (number, signal.signal(number, signal.default_int_handler))
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _open_trace(arguments: argparse.Namespace) -> TraceWriter:
    try:
        return TraceWriter(arguments.trace)
    except OSError as error:
        raise UsageError(
            f"--trace {arguments.trace}: {error.strerror}", value=str(arguments.trace)
        ) from error
