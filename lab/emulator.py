# SPDX-License-Identifier: Apache-2.0
"""
The lab's QEMU: that of Debian's backports with all the libraries it needs, unpacked into a folder.

It runs through the loader of that folder, so it neither needs nor touches the machine's own
libraries. The machine's own QEMU would often do, but with QEMU 7.2 (Debian 12's) a guest with two
processors dies in patched kernel text, and ``iommu-testdev`` came with 10.2.
"""

from __future__ import annotations

import time
from pathlib import Path

from lab.archive import Archive
from lab.cache import Cache, Entry, Inputs
from lab.shell import Shell

__all__ = ["PROGRAM", "build", "command", "find", "has_loader"]

PROGRAM = "qemu"
"""The program of a cache entry: a script, since the loader is called with the folder."""

_PACKAGE = "qemu-system-x86"
_INPUTS: Inputs = {"recipe": "1", "package": _PACKAGE}
# Relative to the program of a cache entry.
_ROOT = "root"
_LIBRARIES = f"{_ROOT}/usr/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2"
_REAL_PROGRAM = f"{_ROOT}/usr/bin/{_PACKAGE.removesuffix('-x86')}-x86_64"
_DATA = (f"{_ROOT}/usr/share/qemu", f"{_ROOT}/usr/share/seabios")

_SCRIPT = f"""\
#!/bin/sh
root=$(dirname "$0")/root
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" \\
    "$root/usr/bin/{_PACKAGE.removesuffix("-x86")}-x86_64" \\
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
"""


def find(cache: Cache) -> Entry | None:
    """Return the QEMU that is there already."""
    return cache.find("qemu", _INPUTS)


def has_loader(program: Path) -> bool:
    """Tell whether *program* is one of the cache, with loader and libraries beside it."""
    return (program.parent / _LOADER).exists()


def command(program: Path, *, preload: Path | None = None) -> list[str]:
    """
    Return the beginning of a command line that starts *program* without a shell in between.

    :param preload: A library for QEMU alone. A program that is not from the cache gets it by
        LD_PRELOAD, which is the caller's to set.
    """
    if not has_loader(program):
        return [str(program)]
    here = program.parent
    return [
        str(here / _LOADER),
        *(("--preload", str(preload)) if preload is not None else ()),
        *("--library-path", str(here / _LIBRARIES), str(here / _REAL_PROGRAM)),
        *(word for folder in _DATA for word in ("-L", str(here / folder))),
    ]


def build(cache: Cache, shell: Shell) -> None:
    """
    Fetch and unpack QEMU. What was downloaded before is used.

    :raises CommandError: A step failed; there is no entry in the cache.
    """
    archive = Archive(cache.work("apt"), shell)
    archive.update()
    packages = archive.download_closure(_PACKAGE)
    if shell.dry_run:
        return
    result = cache.scratch("qemu")
    # No package is configured: the libraries and QEMU's data need no more than to be there.
    extract = 'root=$1; shift; for deb; do dpkg-deb --extract "$deb" "$root" || exit; done'
    shell.run(
        ["sh", "-c", extract, "extract", result / "root", *packages], what="unpacking of QEMU"
    )
    program = result / PROGRAM
    program.write_text(_SCRIPT)
    program.chmod(0o755)
    shell.run([program, "--version"], what="QEMU starts")
    cache.publish(result, "qemu", _INPUTS, now=time.time())
