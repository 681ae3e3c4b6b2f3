# SPDX-License-Identifier: Apache-2.0
"""Options of ``ramblock plan``. Imports nothing of the job: the help has to come at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ramblock.cli.trace_format import trace_format

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["add_to"]

_DESCRIPTION = """\
Will a confidential guest with devices start? How many DMA mappings it needs under each policy, on
each target, how far that is from each limit, and the settings to change where it does not fit: by
formula, by simulation through the real mapper, or from a recording of a real guest.
"""

_EPILOG = """\
examples:
  ramblock plan --memory 16G --device gpu-cc             the guest of kata-containers #11721
  ramblock plan --memory 16G --device gpu-cc --simulate --plot plan.html
  ramblock plan qemu.trace.gz                            the needs of a recorded guest
  ramblock plan --device nic --sweep memory=8G..2T --sweep policy=page,run --table sweep.csv

exit codes: 0 some way fits or may fit, 1 none of those that were asked for does, 2 usage,
3 the recording could not be read to its end, 4 it has no shared memory, so there is nothing to plan
from, 130 a sweep was interrupted (its table has the finished guests)
"""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan",
        help="hold a guest's needs against mapping limits, before it starts",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=_start)
    parser.add_argument(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="plan from a recording, anything that `ramblock check` reads; - is stdin",
    )
    _add_guest(parser)
    _add_host(parser)
    _add_working(parser)
    _add_sweep(parser)
    _add_output(parser)


def _add_guest(parser: argparse.ArgumentParser) -> None:
    guest = parser.add_argument_group("the guest")
    guest.add_argument("--memory", metavar="SIZE", help="such as 16G")
    guest.add_argument("--vcpus", type=int, metavar="N", help="default: 4")
    guest.add_argument(
        "--numa", type=int, metavar="N", help="NUMA nodes, a block of memory each (default: 1)"
    )
    guest.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="PROFILE[:N]",
        help="nic, nvme, gpu-cc or none; N of them; may be repeated (default: none)",
    )
    guest.add_argument(
        "--os",
        metavar="PROFILE[,PROFILE]",
        help="linux-swiotlb or linux-swiotlb-dynamic, lazy-accept or eager-accept"
        " (default: linux-swiotlb)",
    )
    guest.add_argument("--tee", choices=("tdx", "snp"), help="default: tdx")
    guest.add_argument(
        "--virtio-mem", metavar="SIZE[:BLOCK]", help="memory that can be plugged (BLOCK: 2M)"
    )
    guest.add_argument(
        "--backing", choices=("4K", "2M", "1G"), help="pages of its shared memory (default: 4K)"
    )
    guest.add_argument(
        "--conversions",
        type=int,
        metavar="N",
        help="look at so many conversions after boot (default: 10000)",
    )
    guest.add_argument(
        "--rate",
        metavar="LOW..HIGH",
        help="conversions per second after boot (default: assumed from the devices)",
    )


def _add_host(parser: argparse.ArgumentParser) -> None:
    host = parser.add_argument_group("the host (default: those of Linux and QEMU)")
    host.add_argument(
        "--this-host", action="store_true", help="begin with the limits that this host has"
    )
    host.add_argument("--dma-entry-limit", type=int, metavar="N", help="of vfio_iommu_type1: 65535")
    host.add_argument("--max-iotlb-entries", type=int, metavar="N", help="of vhost_vdpa: 2048")
    host.add_argument(
        "--server-maps", type=int, metavar="N", help="max_dma_maps of a vfio-user server: 65535"
    )
    host.add_argument("--memlock", metavar="SIZE", help="RLIMIT_MEMLOCK: unlimited")
    host.add_argument("--cgroup", metavar="SIZE", help="memory.max of the control group: unlimited")
    host.add_argument("--memslots", type=int, metavar="N", help="KVM's, as QEMU sees them: 32764")


def _add_working(parser: argparse.ArgumentParser) -> None:
    working = parser.add_argument_group("the work")
    working.add_argument("--policy", choices=("page", "run"), help="only this policy")
    working.add_argument(
        "--target",
        choices=("type1", "iommufd", "iommufd-cutting", "vfio-user", "vhost-vdpa"),
        help="only this target",
    )
    working.add_argument(
        "--simulate",
        nargs="?",
        const="expected",
        choices=("low", "expected", "high"),
        help="also put the conversions through the real mapper, at this end of the ranges"
        " (expected)",
    )
    working.add_argument(
        "--seed", type=int, metavar="N", help="of the simulation's conversions after boot (1)"
    )
    working.add_argument(
        "--format",
        type=trace_format,
        metavar="NAME",
        help="of the recording (default: found out from it)",
    )


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    sweep = parser.add_argument_group("many guests")
    sweep.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="vary an option: A,B,C or LOW..HIGH (doubling) or LOW..HIGH+STEP; may be repeated",
    )
    sweep.add_argument(
        "--table", type=Path, metavar="FILE", help="write .csv or .parquet (default: CSV to stdout)"
    )
    sweep.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one for each processor)"
    )
    sweep.add_argument(
        "--scheduler", metavar="ADDRESS", help="spread the guests over a Dask cluster"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result for machines")
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write a page with mappings over time and the limits as lines"
        " (HTML, needs no network); simulates",
    )
    output.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _start(arguments: argparse.Namespace) -> int:
    from ramblock.cli.plan_command import start

    return start(arguments)
