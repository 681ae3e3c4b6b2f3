# SPDX-License-Identifier: Apache-2.0
"""
The lab's kernel: Debian's newest source of Linux 7, with the few options that the lab needs.

It starts from ``make tinyconfig``: what a machine without disks, network and graphics needs is
built in ten minutes, not an hour. virtme-ng adds what a guest on the host's file system needs, and
``kernel.config`` beside this file what the project is about. Nothing is a module.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from pathlib import Path

from lab import virtme
from lab.archive import Archive, Package
from lab.cache import Cache, Entry, Inputs
from lab.errors import KernelOptionsError
from lab.shell import Shell

__all__ = ["FRAGMENT", "HEADERS", "IMAGE", "build", "find", "lost_options"]

FRAGMENT = Path(__file__).with_name("kernel.config")
# What an entry of the cache has.
IMAGE = "bzImage"
HEADERS = "headers"

# Counts up when the steps below change in a way that changes what comes out.
_RECIPE = "1"
_PACKAGE = r"linux-source-(7\.\d+)"
# Lines like "  CC      drivers/iommu/iommu.o" of a whole build; about, since versions vary.
_USUAL_STEPS = 2500
_STEP = re.compile(rb"  [A-Z][A-Z0-9_-]+ +\S")
# Kernel developers have the two settings in their environment, for other machines than this one.
_MAKE = ("make", "--no-print-directory", "ARCH=x86_64", "CROSS_COMPILE=")
# Into the image goes who built it and where, unless something else is given.
_ANONYMOUS = {"KBUILD_BUILD_USER": "ramblock", "KBUILD_BUILD_HOST": "lab"}


def find(cache: Cache) -> Entry | None:
    """Return the kernel that is built already, from any version of the source."""
    return cache.find("kernel", _inputs(FRAGMENT.read_text()))


def build(cache: Cache, shell: Shell, tools: Path) -> None:
    """
    Build the kernel, going on from where an earlier build was interrupted.

    :param tools: The folder of virtme-ng, which completes the configuration.
    :raises KernelOptionsError: Options of the fragment did not come out.
    :raises CommandError: A step failed. What was downloaded, unpacked and compiled is kept.
    """
    # Read once: the file may be edited while the build goes on, and the entry must not be named for
    # the new text.
    fragment = FRAGMENT.read_text()
    archive = Archive(cache.work("apt"), shell)
    archive.update()
    package = Package("linux-source-7.x", "VERSION") if shell.dry_run else archive.newest(_PACKAGE)
    tree = _unpacked(cache, shell, archive, package)
    _configure(shell, tree, tools, fragment)
    compiled = _Compiled(tree)
    # Nothing is gained from more jobs than processors: the sources are in the page cache by now.
    jobs = f"--jobs={len(os.sched_getaffinity(0))}"
    shell.run(
        [*_MAKE, jobs, "bzImage"],
        what="kernel",
        cwd=tree,
        environment=_ANONYMOUS,
        describe=compiled.describe,
    )
    result = cache.work("kernel") if shell.dry_run else cache.scratch("kernel")
    shell.run(
        [*_MAKE, "headers_install", f"INSTALL_HDR_PATH={result / HEADERS}"],
        what="kernel headers",
        cwd=tree,
    )
    if shell.dry_run:
        return
    shutil.copy(tree / "arch/x86/boot/bzImage", result / IMAGE)
    shutil.copy(tree / ".config", result / "config")
    inputs = {**_inputs(fragment), "package": package.name, "version": package.version}
    cache.publish(result, "kernel", inputs, now=time.time())
    # The tree stays: two gigabytes, but a changed kernel.config then costs a minute and not a
    # quarter of an hour.
    for other in tree.parent.glob("linux-*"):
        if other != tree:
            shutil.rmtree(other)


def lost_options(fragment: str, config: str) -> list[tuple[str, str]]:
    """
    Compare what was asked for with what came out.

    A make of the kernel drops an unmet option without a word.

    :param fragment: Lines ``CONFIG_X=y`` and ``# CONFIG_X is not set``.
    :param config: The ``.config``.
    :return: For each difference the wanted line and the one there is.
    """
    actual = _options(config)
    different = []
    for name, wanted in _options(fragment).items():
        # An option that cannot be chosen at all is not in the file, and is as good as switched off.
        got = actual.get(name, f"# {name} is not set")
        if got != wanted:
            different.append((wanted, got))
    return different


def _options(text: str) -> dict[str, str]:
    return {
        m[1]: m[0] for m in re.finditer(r"^(?:# )?(CONFIG_\w+)(?:=.*| is not set)$", text, re.M)
    }


def _inputs(fragment: str) -> Inputs:
    digest = hashlib.sha256(fragment.encode()).hexdigest()
    return {"recipe": _RECIPE, "fragment": digest, "virtme-ng": virtme.VERSION}


def _unpacked(cache: Cache, shell: Shell, archive: Archive, package: Package) -> Path:
    # A make of the kernel refuses folders with colons in their names.
    tree = cache.work("linux-" + re.sub(r"[^\w.]", "-", package.version))
    if tree.exists():
        return tree
    folder = cache.work("unpacking") if shell.dry_run else cache.scratch("unpacking")
    deb = archive.download(package)
    # The package holds nothing but one tar file.
    packed = folder / "usr" / "src" / f"{package.name}.tar.xz"
    shell.run(["dpkg-deb", "--extract", deb, folder], what="unpacking of the package")
    shell.run(
        ["tar", "--extract", f"--file={packed}", f"--directory={folder}"],
        what="unpacking of the source",
    )
    if not shell.dry_run:
        os.sync()  # as for an entry: what has this name is whole
        (folder / package.name).rename(tree)
        shutil.rmtree(folder)
    return tree


def _configure(shell: Shell, tree: Path, tools: Path, fragment: str) -> None:
    custom = tree / "lab.config"
    if not shell.dry_run:
        custom.write_text(fragment)
    # Written anew each time; make compares option by option, so equal ones cost an interrupted
    # build nothing.
    shell.run([*_MAKE, "tinyconfig"], what="kernel tinyconfig", cwd=tree)
    shell.run(virtme.configure_command(tools, custom), what="kernel options of virtme-ng", cwd=tree)
    # virtme-ng wants debug information: five times the build's size and no use to us.
    shell.run(
        ["scripts/config", "-d", "DEBUG_INFO_DWARF_TOOLCHAIN_DEFAULT", "-e", "DEBUG_INFO_NONE"],
        what="kernel options without debug information",
        cwd=tree,
    )
    shell.run([*_MAKE, "olddefconfig"], what="kernel olddefconfig", cwd=tree)
    if not shell.dry_run:
        lost = lost_options(fragment, (tree / ".config").read_text())
        if lost:
            raise KernelOptionsError(lost)


class _Compiled:
    # How much of the kernel is compiled, from make's output; an interrupted build starts where it
    # was.
    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._steps: int | None = None

    def describe(self, line: bytes) -> str:
        if self._steps is None:
            self._steps = sum(
                name.endswith(".o") for _, _, names in os.walk(self._tree) for name in names
            )
        if _STEP.match(line):
            self._steps += 1
        percent = min(99, 100 * self._steps // _USUAL_STEPS)
        return f"{self._steps} files, about {percent} %"
