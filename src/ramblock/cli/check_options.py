# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock check``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ramblock.cli.check_how import HOW
from ramblock.cli.trace_format import trace_format

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["add_to"]

_DESCRIPTION = """\
Did a device ever have access to a page that was private? Finds stale and missing IOMMU mappings,
and broken rules, in the recordings of a VMM or a kernel: traces of QEMU (text and binary), of Linux
(ftrace, trace-cmd, perf script, bpftrace), and ramblock's own.
"""

_EPILOG = """\
examples:
  ramblock check --how ftrace               how to record such a trace
  ramblock check qemu.trace kernel.txt.gz   two systems, one after the other
  ramblock check --merge kernel.txt type1.txt --report report.html
                                            two recordings of one system
  ramblock check --unmap exact qemu.trace   mappings that a server with exact unmaps would keep

exit codes: 0 nothing found, 1 stale or missing mappings or broken rules, 2 usage, 3 an input could
not be read to its end and nothing was found in the rest, 4 cannot tell: the trace shows nothing
that could be judged; of several files the worst counts, 1 over 3 over 4 over 0
"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check",
        help="find stale and missing IOMMU mappings in traces of VMMs and kernels",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "file",
        nargs="*",
        metavar="FILE",
        help="recording; .gz and .zst are read as they are; - is stdin",
    )
    parser.add_argument(
        "--how",
        choices=tuple(HOW),
        help="print the commands that record a trace for the check, and exit",
    )
    _add_reading(parser)
    _add_judging(parser)
    _add_working(parser)
    _add_output(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--merge", action="store_true", help="the files are of one system: merge them by time"
    )
    reading.add_argument(
        "--offset",
        action="append",
        default=[],
        metavar="FILE=SECONDS",
        help="add this to the times of a file, whose clock is another (with --merge)",
    )
    reading.add_argument(
        "--format",
        type=trace_format,
        metavar="NAME",
        help="of all files (default: found out from each)",
    )
    reading.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="BLOCK=GPA+SIZE[@OFFSET]",
        help="where a block lies in the guest, if the trace does not tell; may be repeated",
    )
    reading.add_argument(
        "--virtio-mem-block",
        metavar="SIZE",
        help="block-size of QEMU's virtio-mem device, which its trace does not tell",
    )


def _add_judging(parser: argparse.ArgumentParser) -> None:
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--grace",
        default="10ms",
        metavar="TIME",
        help="a conversion is over when nothing of it was seen for so long,"
        " where the trace does not tell its end (default: 10ms)",
    )
    judging.add_argument(
        "--unmap",
        choices=("exact", "whole", "cut"),
        help="the rule for an unmap: it names one whole mapping, whole mappings, or any range",
    )
    judging.add_argument(
        "--strict",
        action="store_true",
        help="notes are failures too: windows inside of their own conversion or of length zero,"
        " faults, unmaps of nothing and other rules of the protocol",
    )
    judging.add_argument(
        "--allow-empty",
        action="store_true",
        help="exit code 0, not 4, if nothing could be judged",
    )


def _add_working(parser: argparse.ArgumentParser) -> None:
    working = parser.add_argument_group("many files")
    working.add_argument(
        "--jobs", type=int, metavar="N", help="files at once (default: one for each processor)"
    )
    working.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="spread the files over a Dask cluster, whose workers see them under the same names",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result for machines")
    output.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page with pictures (HTML, needs no network)",
    )
    output.add_argument(
        "--perfetto", type=Path, metavar="FILE", help="write a trace for the Perfetto UI"
    )
    output.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.check_command import start

    return start(arguments)
