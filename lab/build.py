# SPDX-License-Identifier: Apache-2.0
"""All that the lab needs, from the cache or built now."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab import busybox, double, emulator, kernel, packages, recorders, virtme
from lab.cache import Cache, Entry
from lab.shell import Shell

__all__ = ["Lab", "provide", "provide_double"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Where the parts are."""

    kernel: Path
    qemu: Path
    headers: Path | None
    """The kernel's headers for programs; None with a kernel of somebody's own."""
    busybox: Path | None
    """
    What guests of the tests on this machine run.

    None as for the headers, which those tests need as well.
    """
    double: Path | None
    """The shim and the firmware of ``lab.qemu_double``; None: not built."""
    recorders: Path | None
    """The folder of an entry with programs that record the kernel's events; None: not built."""
    launcher: tuple[str, ...]
    """The command that boots a kernel."""


def provide(
    cache: Cache,
    *,
    own_kernel: Path | None = None,
    own_qemu: Path | None = None,
    dry_run: bool = False,
) -> Lab:
    """
    Return the lab; build what is not in the cache.

    It takes a quarter of an hour once, and no time after that.

    :param own_kernel: A bzImage to take instead of ours.
    :param own_qemu: A qemu-system-x86_64 to take instead of ours.
    :param dry_run: Print the commands instead; the result then names places in which nothing is.
    :raises LabError: It could not be built. What was done so far is kept for the next try.
    """
    needs = _Needs(own_kernel is None, own_qemu is None)
    _build_missing(cache, needs.missing, dry_run=dry_run)
    kernel_entry, qemu_entry = kernel.find(cache), emulator.find(cache)
    double_entry, recorders_entry = double.find(cache), recorders.find(cache)
    absent = cache.root / "not-built"
    tools_path = _path(busybox.find(cache), absent)
    kernel_path = kernel_entry.path if kernel_entry else absent
    return Lab(
        kernel=own_kernel or kernel_path / kernel.IMAGE,
        qemu=own_qemu or (qemu_entry.path if qemu_entry else absent) / emulator.PROGRAM,
        headers=None if own_kernel else kernel_path / kernel.HEADERS,
        busybox=None if own_kernel else tools_path / busybox.PROGRAM,
        double=double_entry.path if double_entry else None,
        recorders=recorders_entry.path if recorders_entry else None,
        launcher=tuple(virtme.run_command(_path(virtme.find(cache), absent))),
    )


def provide_double(cache: Cache, *, own_qemu: Path | None = None, dry_run: bool = False) -> None:
    """
    Make sure that QEMU and its double are there, without kernel and VM: a minute once.

    :raises LabError: It could not be built. What was done so far is kept for the next try.
    """

    def missing(cache: Cache) -> set[str]:
        found = {
            "qemu": emulator.find(cache) if own_qemu is None else True,
            "double": double.find(cache),
        }
        return {name for name, entry in found.items() if not entry}

    _build_missing(cache, missing, dry_run=dry_run)


def _build_missing(cache: Cache, missing: Callable[[Cache], set[str]], *, dry_run: bool) -> None:
    if dry_run:
        _build(cache, Shell(cache.logs, dry_run=True), missing(cache))
    elif missing(cache):
        if cache.is_locked():
            print(f"lab: somebody else is building in {cache.root}; waiting", file=sys.stderr)
        with cache.lock() as lock:
            # Once more: it may have been built while we waited.
            _build(cache, Shell(cache.logs, keep_open=[lock]), missing(cache))


@dataclass(frozen=True, slots=True)
class _Needs:
    kernel: bool
    qemu: bool

    def missing(self, cache: Cache) -> set[str]:
        found = {
            "virtme": virtme.find(cache),
            "qemu": emulator.find(cache) if self.qemu else True,
            "busybox": busybox.find(cache) if self.kernel else True,
            "kernel": kernel.find(cache) if self.kernel else True,
            # Where both are somebody's own, nothing of ours is built that was not asked for.
            "double": double.find(cache) if self.kernel or self.qemu else True,
            "recorders": recorders.find(cache) if self.kernel or self.qemu else True,
        }
        return {name for name, entry in found.items() if not entry}


def _build(cache: Cache, shell: Shell, missing: set[str]) -> None:
    if missing & {"busybox", "kernel", "qemu", "recorders"}:
        packages.check_machine()
    if "virtme" in missing:
        virtme.build(cache, shell)
    # The quick one first: what is wrong with the machine shows early.
    if "qemu" in missing:
        emulator.build(cache, shell)
    if "double" in missing:
        if any(shutil.which(tool) is None for tool in double.TOOLS):
            packages.provide(shell, double.PACKAGES)
        double.build(cache, shell)
    if "busybox" in missing:
        busybox.build(cache, shell)
    if "recorders" in missing:
        recorders.build(cache, shell)
    if "kernel" in missing:
        packages.provide(shell)
        tools = _path(virtme.find(cache), cache.root / "not-built")
        kernel.build(cache, shell, tools)


def _path(entry: Entry | None, absent: Path) -> Path:
    return entry.path if entry else absent
