# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock doctor``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["add_to"]

_DESCRIPTION = """\
Examine this host for confidential guests and their devices: KVM, IOMMU, VFIO, iommufd, limits,
memory. It changes nothing, needs no root, and names the facts that it could not see.
"""

_EPILOG = """\
examples:
  ramblock doctor                       everything, with a remedy for each lack
  ramblock doctor --for iommufd         exit code 1 if devices behind iommufd cannot work here

exit codes: 0 nothing stands in the way, 1 something does (--for), 2 usage
"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="examine this host for confidential guests and their devices",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("vfio", "iommufd", "kvm", "lab"),
        help="the purpose of the host: exit code 1 if something that it needs is lacking,"
        " or cannot be seen",
    )
    parser.add_argument("--json", action="store_true", help="print the lines for machines")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.doctor_command import start

    return start(arguments)
