# SPDX-License-Identifier: Apache-2.0
"""
The programs that record the kernel's events: trace-cmd, perf and bpftrace.

They are Debian's, from where QEMU comes, and run by the loader of their own folder as QEMU does.
The tests in the VM run them as ``ramblock check --how`` prints it.
"""

from __future__ import annotations

import time

from lab.archive import Archive
from lab.cache import Cache, Entry, Inputs
from lab.shell import Shell

__all__ = ["PROGRAMS", "RECORDERS_VARIABLE", "build", "find"]

RECORDERS_VARIABLE = "RAMBLOCK_LAB_RECORDERS"
"""Where programs in the lab's VM find a folder with them."""

PROGRAMS = "bin"
"""The folder of a cache entry with the programs."""

# By program; and an argument with which it ends well, wherever it is.
_PACKAGES = {
    "trace-cmd": ("trace-cmd", "options"),
    "perf": ("linux-perf", "--version"),
    "bpftrace": ("bpftrace", "--version"),
}
_INPUTS: Inputs = {
    "recipe": "1",
    "package": " ".join(package for package, _ in _PACKAGES.values()),
}

# libtraceevent's plugins are at a fixed place, which is the machine's own.
_SCRIPT = """\
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")/root
libraries=$root/usr/lib/x86_64-linux-gnu
export TRACEEVENT_PLUGIN_DIR="$libraries/traceevent/plugins"
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/{program}" "$@"
"""


def find(cache: Cache) -> Entry | None:
    """Return the recorders that are there already."""
    return cache.find("recorders", _INPUTS)


def build(cache: Cache, shell: Shell) -> None:
    """
    Fetch and unpack them. What was downloaded before is used.

    :raises CommandError: A step failed; there is no entry in the cache.
    """
    archive = Archive(cache.work("apt"), shell)
    archive.update()
    packages = [
        file for package, _ in _PACKAGES.values() for file in archive.download_closure(package)
    ]
    if shell.dry_run:
        return
    result = cache.scratch("recorders")
    extract = 'root=$1; shift; for deb; do dpkg-deb --extract "$deb" "$root" || exit; done'
    shell.run(
        ["sh", "-c", extract, "extract", result / "root", *dict.fromkeys(packages)],
        what="unpacking of the recorders",
    )
    folder = result / PROGRAMS
    folder.mkdir()
    for program, (_, argument) in _PACKAGES.items():
        script = folder / program
        script.write_text(_SCRIPT.format(program=program))
        script.chmod(0o755)
        shell.run([script, argument], what=f"{program} starts")
    cache.publish(result, "recorders", _INPUTS, now=time.time())
