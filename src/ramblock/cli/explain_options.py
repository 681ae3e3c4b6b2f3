# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock explain``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["add_to"]

_DESCRIPTION = """\
Find the known messages about the memory of confidential guests and their devices in a log, and say
for each: what failed, why, who writes it, what to do, and where that is known from. QEMU's, KVM's,
VFIO's, iommufd's, the IOMMUs', kata's, libvirt's, Cloud Hypervisor's, and those of guests.
"""

_EPILOG = """\
examples:
  kubectl logs POD | ramblock explain         whatever stands before the messages, and behind
  journalctl -b -u containerd | ramblock explain
  dmesg | ramblock explain --json
  ramblock explain qemu.log.gz

exit codes: 0 something was explained, 2 usage, 3 the log could not be read to its end and nothing
was explained, 4 nothing known is in it
"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "explain",
        help="explain the messages of a log: what failed, why, and what to do",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help="log; .gz, .xz, .bz2 and .zst are read as they are; - is stdin (default)",
    )
    parser.add_argument("--list", action="store_true", help="print all that is known, and exit")
    parser.add_argument("--json", action="store_true", help="print the result for machines")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.explain_command import start

    return start(arguments)
