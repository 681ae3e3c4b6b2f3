# SPDX-License-Identifier: Apache-2.0
"""
A shell and its commands in one static file: all programs of a guest of this machine's tests.

It is Debian's, from where QEMU comes, and an entry of its own in the cache: a few hundred
kilobytes, with no part in the VM that the other tests run in.
"""

from __future__ import annotations

import time

from lab.archive import Archive
from lab.cache import Cache, Entry, Inputs
from lab.shell import Shell

__all__ = ["PROGRAM", "build", "find"]

PROGRAM = "root/usr/bin/busybox"
"""The program of a cache entry."""

_PACKAGE = "busybox-static"
_INPUTS: Inputs = {"recipe": "1", "package": _PACKAGE}


def find(cache: Cache) -> Entry | None:
    """Return the busybox that is there already."""
    return cache.find("busybox", _INPUTS)


def build(cache: Cache, shell: Shell) -> None:
    """
    Fetch and unpack busybox.

    :raises CommandError: A step failed; there is no entry in the cache.
    """
    archive = Archive(cache.work("apt"), shell)
    archive.update()
    packages = archive.download_closure(_PACKAGE)
    if shell.dry_run:
        return
    result = cache.scratch("busybox")
    for package in packages:
        shell.run(["dpkg-deb", "--extract", package, result / "root"], what="unpacking of busybox")
    shell.run([result / PROGRAM, "true"], what="busybox starts")
    cache.publish(result, "busybox", _INPUTS, now=time.time())
