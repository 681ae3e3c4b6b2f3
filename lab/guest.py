# SPDX-License-Identifier: Apache-2.0
"""
The VM's inside: a shell script around the command, and the folder that it shares with the host.

The folder is on the host, and the guest has it as a 9p file system of its own at ``EXCHANGE``. Each
write of the guest is in the host's file before it returns, so what was written is there even if the
VM dies at once.

    script    what virtme-ng starts
    status    the channel for what became of the command: ``started``, then ``exit N``
    output    the command's standard output and error
    ...       whatever else the command leaves there, a report for instance
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["EXCHANGE", "bootstrap", "exchange_options", "exit_status", "script", "started"]

EXCHANGE = "/run/ramblock-lab"
_TAG = "ramblock-lab"
# The host's file system as it is, below everything that has been mounted over it.
_HOST = "/run/host"

_SCRIPT = """\
exec </dev/null >{exchange}/output 2>&1
mkdir {host} && mount --bind / {host}
mount -t tmpfs -o mode=1777 tmpfs /tmp
# Hidden by the guest's own file systems (the one above, /var/tmp and others): put back.
for place in {places}; do
    [ -e "$place" ] || {{ mkdir -p "$place" && mount --bind "{host}$place" "$place"; }}
done
cd {directory} 2>/dev/null || cd /
ulimit -l unlimited
echo started >{exchange}/status
taskset --cpu-list {processors} env {environment} sh -c {command}
code=$?
echo "exit $code" >>{exchange}/status
"""


def bootstrap() -> str:
    """Return the command for virtme-ng, short for its limit: mount the folder, run its script."""
    options = "trans=virtio,version=9p2000.L,msize=512000"
    mount = f"mount -t 9p -o {options} {_TAG} {EXCHANGE}"
    return f"mkdir {EXCHANGE} && {mount} && exec sh {EXCHANGE}/script"


def exchange_options(folder: Path) -> list[str]:
    """Return QEMU's options that give *folder* to the guest."""
    path = str(folder).replace(",", ",,")  # QEMU's way to write a comma in a value
    return [
        "-fsdev",
        f"local,id=exchange,path={path},security_model=none",
        "-device",
        f"virtio-9p-pci,fsdev=exchange,mount_tag={_TAG}",
    ]


def script(
    command: str,
    *,
    processors: str,
    directory: Path,
    places: Sequence[Path],
    environment: Mapping[str, str],
) -> str:
    """
    Return the script that runs *command*, text for a shell, and reports how it ended.

    :param processors: Of the VM's those where the command runs: ``1-2``.
    :param directory: Where the command runs; the root if the guest has no such folder.
    :param places: Folders of the host that the command needs, wherever they are: a checkout may
        well be in /tmp.
    """
    return _SCRIPT.format(
        exchange=EXCHANGE,
        host=_HOST,
        processors=processors,
        places=shlex.join(str(place) for place in places) or '""',
        directory=shlex.quote(str(directory)),
        environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
        command=shlex.quote(command),
    )


def started(status: str) -> bool:
    """Tell whether the command was started, from the text of ``status``."""
    return status.startswith("started\n")


def exit_status(status: str) -> int | None:
    """Return the command's exit code from the text of ``status``; None if it has not ended."""
    lines = status.splitlines(keepends=True)
    # A line without its end is one that the VM died in.
    if len(lines) < 2 or not lines[1].startswith("exit ") or not lines[1].endswith("\n"):
        return None
    return int(lines[1].removeprefix("exit "))
