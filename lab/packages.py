# SPDX-License-Identifier: Apache-2.0
"""The Debian packages that the machine needs before a build, installed if we are root."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence

from lab.errors import LabError, MissingPackagesError
from lab.shell import Shell

__all__ = ["BUILD_PACKAGES", "check_machine", "missing_packages", "provide"]

# For the kernel, by what needs them: Documentation/process/changes.rst of its source has the list.
BUILD_PACKAGES = (
    "bc",
    "bison",
    "cpio",
    "flex",
    "gcc",
    "kmod",
    "libc6-dev",
    "libelf-dev",  # objtool
    "libssl-dev",
    "lz4",  # the image's compression: the one that is fastest to undo under emulation
    "make",
    "rsync",  # make headers_install
    "xz-utils",  # the packed source
)


def check_machine() -> None:
    """
    Make sure that the lab can be built here at all.

    :raises LabError: It cannot; the text says what to do instead.
    """
    if (machine := platform.machine()) != "x86_64":
        raise LabError(f"the lab's kernel and QEMU are built on x86_64 only, and this is {machine}")
    lacking = [name for name in ("apt-get", "dpkg-deb", "dpkg-query") if not shutil.which(name)]
    if lacking:
        raise LabError(
            f"the lab is built from Debian's packages, and there is no {' and no '.join(lacking)}"
            " here; "
            "bring your own with --kernel and --qemu"
        )


def missing_packages(packages: Sequence[str]) -> list[str]:
    """Return those of *packages* that are not installed, in their order."""
    # Exit code 1 says that some are unknown: those are missing as well.
    listing = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    installed = {line.split()[0] for line in listing.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def provide(shell: Shell, packages: Sequence[str] = BUILD_PACKAGES) -> None:
    """
    Install what is missing of *packages*.

    :raises MissingPackagesError: We are not root; nothing has been done.
    :raises CommandError: apt-get failed.
    """
    if not (missing := missing_packages(packages)):
        return
    if os.geteuid() != 0 and not shell.dry_run:
        raise MissingPackagesError(missing)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    shell.run(["apt-get", "-q", "update"], what="update of the package lists", environment=quiet)
    shell.run(
        ["apt-get", "-q", "install", "--yes", "--no-install-recommends", *missing],
        what="installation of build packages",
        environment=quiet,
    )
