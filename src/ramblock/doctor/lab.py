# SPDX-License-Identifier: Apache-2.0
"""The lab's needs: Debian's packages to build a kernel and boot it under emulation, no KVM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ramblock.doctor.line import Line, Purpose, Status
from ramblock.units import GIB, format_size

__all__ = ["look"]

_NEEDED = (Purpose.LAB,)
#: Sources, build and result of the kernel, and the packages of QEMU.
_DISK = 12 * GIB


def look(root: Path) -> Iterator[Line]:
    """Look for the lab's needs."""
    machine = os.uname().machine
    yield Line(
        name="processor",
        status=Status.GOOD if machine == "x86_64" else Status.LACKING,
        found=machine,
        why="the lab's kernel and QEMU are built for x86-64",
        todo="" if machine == "x86_64" else "an x86-64 machine",
        needed_for=_NEEDED,
    )
    packages = shutil.which("apt-get")
    yield Line(
        name="Debian's packages",
        status=Status.GOOD if packages else Status.LACKING,
        found=packages or "no apt-get",
        why="kernel source, QEMU and tools come from there",
        todo="" if packages else "Debian 12 or newer, or a relative; or --kernel and --qemu",
        needed_for=_NEEDED,
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    built = any((cache / "ramblock-lab/kernel").glob("*/bzImage"))
    enough = free >= _DISK or built
    yield Line(
        name="the lab's cache",
        status=Status.GOOD if enough else Status.LACKING,
        found=f"{'a kernel is built; ' if built else ''}{format_size(free)} are free in {cache}",
        why="the first build takes some gigabytes and a quarter of an hour",
        todo="" if enough else f"{format_size(_DISK)} of free space, or another XDG_CACHE_HOME",
        needed_for=_NEEDED,
    )
