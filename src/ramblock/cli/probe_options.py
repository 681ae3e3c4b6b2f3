# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock probe``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["add_to"]

_DESCRIPTION = """\
Present a vfio-user device that any VMM can plug in, and watch the memory that the VMM lets it
reach: every DMA window, as it comes and goes, checked against the rules of the protocol. It serves
one VMM after the other until Ctrl-C, and reports its findings then.
"""

_EPILOG = """\
examples:
  ramblock probe --socket /tmp/probe.sock --touch
  qemu-system-x86_64 -machine q35,memory-backend=ram -m 2G \\
      -object memory-backend-memfd,id=ram,size=2G,share=on \\
      -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/probe.sock"}}' ...

exit codes: 0 nothing found, 1 rules were broken or windows stayed that should have gone, 2 usage
"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "probe",
        help="a vfio-user device that shows which memory its VMM lets it reach",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "--socket", type=Path, required=True, metavar="PATH", help="where to listen"
    )
    parser.add_argument(
        "--unmap",
        choices=("lenient", "exact"),
        default="lenient",
        help="the rule for an unmap: it names whole windows (default), or exactly one,"
        " as the specification and libvfio-user want it",
    )
    parser.add_argument(
        "--touch", action="store_true", help="read random pages of the windows all the time"
    )
    parser.add_argument(
        "--scribble",
        action="store_true",
        help="write to random pages as well: THE GUEST'S DATA IS LOST",
    )
    parser.add_argument(
        "--expect",
        choices=("virtio-mem",),
        help="compare the windows with the plugged memory, as QEMU tells it (needs --qmp)",
    )
    parser.add_argument("--qmp", type=Path, metavar="PATH", help="QEMU's QMP socket")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print every event, one JSON object per line"
    )
    output.add_argument("--trace", type=Path, metavar="FILE", help="write every event to a file")
    output.add_argument("-q", "--quiet", action="store_true", help="show nothing before the end")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.probe_command import start

    return start(arguments)
