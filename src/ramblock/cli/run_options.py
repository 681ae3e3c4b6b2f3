# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock run``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ramblock.errors import UsageError
from ramblock.units import parse_size

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["VFIO_USER", "add_to"]

_DESCRIPTION = """\
Run a confidential guest that converts pages while devices do DMA, on memory of this host, watched
by a verifier that shares no code with the rest. At the end everything is compared; a stale or a
missing mapping is a violation. The guest is a script, or a program on a vCPU of KVM; devices and
IOMMUs are software, or real ones behind VFIO.
"""

_EPILOG = """\
examples:
  ramblock run                              a 4 GiB guest, two devices, 26,000 requests
  ramblock run --uncoordinated              the same without the mechanism: stale mappings
  ramblock run --inject unmap:short:40      a device that does not let go: poison
  ramblock run examples/budget.toml --seed 7 --json
  ramblock run --guest kvm --iommu iommufd --memory 512M
                                            on KVM, an IOMMU, QEMU's edu or iommu-testdev
  ramblock run --iommu vfio-user:/tmp/probe.sock
                                            on the device of a running `ramblock probe`
"""


#: The prefix of the path of a server's socket.
VFIO_USER = "vfio-user:"
_IOMMUS = ("soft", "type1", "iommufd", "iommufd-native", "iommufd-cutting")


def size(text: str) -> int:
    """Read a size option."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error}, expected {error.expected}") from None


def positive(text: str) -> int:
    """Read a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def iommu(text: str) -> str:
    """Parse the option for the devices' DMA target."""
    if text in _IOMMUS or (text.startswith(VFIO_USER) and text != VFIO_USER):
        return text
    known = ", ".join([*_IOMMUS, f"{VFIO_USER}PATH"])
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "run",
        help="run a confidential guest under devices, on embedded parts",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "scenario",
        nargs="?",
        type=Path,
        metavar="SCENARIO.toml",
        help="the scenario; options below override it",
    )
    guest = parser.add_argument_group("guest")
    guest.add_argument(
        "--guest",
        choices=("auto", "kvm", "script"),
        help="a vCPU of KVM, or only a script; auto (default): KVM where it enforces"
        " page attributes",
    )
    guest.add_argument("--memory", type=size, metavar="SIZE", help="RAM of the guest (default: 4G)")
    guest.add_argument(
        "--workload",
        metavar="NAME|TRACE",
        help="linux (default), firmware, fragmenter, reboot, or a trace",
    )
    guest.add_argument(
        "--conversions",
        type=positive,
        metavar="N",
        help="requests in all (default: 26000; with KVM, vfio-user or a real IOMMU 500)",
    )
    guest.add_argument(
        "--seed", type=int, metavar="N", help="same seed, same requests (default: 1)"
    )
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--devices", type=int, metavar="N", help="each behind an IOMMU of its own (default: 2)"
    )
    devices.add_argument(
        "--iommu",
        type=iommu,
        metavar="KIND",
        help="the devices' DMA target: soft (default), vfio-user:PATH (a server's socket), or,"
        " with an IOMMU, VFIO and"
        " test devices of QEMU, type1, iommufd, iommufd-native, iommufd-cutting",
    )
    devices.add_argument(
        "--device",
        action="append",
        metavar="PCI_ADDRESS",
        help="a real device, bound to vfio-pci for the run; may be repeated"
        " (default: the edu and the iommu-testdev)",
    )
    devices.add_argument(
        "--policy",
        choices=("auto", "page", "run"),
        help="how much one mapping covers (default: auto)",
    )
    devices.add_argument(
        "--max-mappings", type=positive, metavar="N", help="mapping budget of each device"
    )
    trouble = parser.add_argument_group("trouble")
    trouble.add_argument(
        "--uncoordinated",
        action="store_true",
        default=None,
        help="map all RAM at boot and tell nobody of conversions",
    )
    trouble.add_argument(
        "--inject",
        metavar="FAULTS",
        help="fail calls on purpose: map:N, unmap:N, unmap:short:N, attribute:N, free:N,"
        " separated by commas",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the report for machines")
    output.add_argument(
        "--trace", type=Path, metavar="FILE", help="write every event, one JSON object per line"
    )
    output.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="audit the trace, as `ramblock check` does, and write a page with pictures"
        " (HTML, needs no network)",
    )
    output.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.run_command import start

    return start(arguments)
