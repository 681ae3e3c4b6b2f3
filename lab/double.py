# SPDX-License-Identifier: Apache-2.0
"""
The shim and the firmware of the QEMU double: built with gcc and binutils.

They are an entry of the lab's cache, named for their sources. ``locate`` finds what a guest needs,
also inside the lab's VM, where the environment says it.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lab import emulator
from lab.cache import Cache, Entry, Inputs
from lab.errors import LabError
from lab.shell import Shell

__all__ = [
    "DOUBLE_VARIABLE",
    "PACKAGES",
    "QEMU_VARIABLE",
    "Programs",
    "build",
    "find",
    "locate",
    "missing",
]

DOUBLE_VARIABLE = "RAMBLOCK_LAB_DOUBLE"
"""Where an entry of the cache is, for programs that have no cache: those in the lab's VM."""
QEMU_VARIABLE = "RAMBLOCK_LAB_QEMU"

_HERE = Path(__file__).parent / "qemu_double"
_SHIM, _FIRMWARE = "shim.so", "firmware.bin"
TOOLS = ("as", "gcc", "ld", "objcopy")
"""Programs for :func:`build`."""
PACKAGES = ("binutils", "gcc", "libc6-dev")
"""Debian packages that have them."""


def _sources() -> list[Path]:
    return [*sorted((_HERE / "shim").glob("*.[ch]")), _HERE / "firmware.S"]


def _inputs() -> Inputs:
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return {"recipe": "1", "sources": digest.hexdigest()[:16]}


def find(cache: Cache) -> Entry | None:
    """Return the double that is there already."""
    return cache.find("double", _inputs())


def build(cache: Cache, shell: Shell) -> None:
    """
    Compile the shim and assemble the firmware: a second or two.

    :raises CommandError: A step failed; there is no entry in the cache.
    """
    result = cache.work("double") if shell.dry_run else cache.scratch("double")
    shim = [source for source in _sources() if source.suffix == ".c"]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    shell.run(["gcc", *flags, "-o", result / _SHIM, *shim], what="shim of the QEMU double")
    code, linked = result / "firmware.o", result / "firmware.elf"
    steps: tuple[tuple[str | Path, ...], ...] = (
        ("as", "-o", code, _HERE / "firmware.S"),
        ("ld", "-Ttext=0", "-o", linked, code),
        ("objcopy", "-O", "binary", "-j", ".text", linked, result / _FIRMWARE),
    )
    for step in steps:
        shell.run(step, what=f"firmware of the QEMU double by {step[0]}")
    if shell.dry_run:
        return
    cache.publish(result, "double", _inputs(), now=time.time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What a guest of the double needs."""

    qemu: Path
    """The program; one of the lab's cache is started by its own loader."""
    shim: Path
    firmware: Path

    def command(self) -> list[str]:
        """Return the beginning of QEMU's command line."""
        return emulator.command(self.qemu, preload=self.shim)

    def environment(self) -> dict[str, str]:
        """Return what QEMU's environment needs for the shim."""
        return {} if emulator.has_loader(self.qemu) else {"LD_PRELOAD": str(self.shim)}


def locate(qemu: Path | None = None) -> Programs:
    """
    Find the programs.

    :param qemu: Another QEMU to take.
    :raises LabError: They are not built; nothing is built here.
    """
    if (reason := missing(qemu)) is not None:
        raise LabError(reason)
    double = _double()
    found = qemu or _qemu()
    assert double is not None
    assert found is not None
    return Programs(qemu=found, shim=double / _SHIM, firmware=double / _FIRMWARE)


def missing(qemu: Path | None = None) -> str | None:
    """Say what is not there yet and how to get it; None: nothing."""
    if qemu is None and _qemu() is None:
        return "the lab's QEMU is not in the cache; run: make lab"
    if _double() is None:
        return "the QEMU double is not built, or its sources have changed since; run: make lab"
    return None


def _double() -> Path | None:
    if folder := os.environ.get(DOUBLE_VARIABLE):
        return Path(folder)
    entry = find(Cache())
    return entry.path if entry else None


def _qemu() -> Path | None:
    if program := os.environ.get(QEMU_VARIABLE):
        return Path(program)
    entry = emulator.find(Cache())
    return entry.path / emulator.PROGRAM if entry else None
