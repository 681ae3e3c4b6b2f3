# SPDX-License-Identifier: Apache-2.0
"""
virtme-ng, in a Python environment of its own: it boots a kernel on the host's file system.

Its modules are started by name, not by its commands: those have the path of the environment written
into them, and the environment is built somewhere else than where it ends up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lab.cache import Cache, Entry, Inputs
from lab.shell import Shell

__all__ = ["VERSION", "build", "configure_command", "find", "run_command"]

VERSION = "1.42"


def find(cache: Cache) -> Entry | None:
    """Return the environment that is there already."""
    return cache.find("virtme", _inputs())


def build(cache: Cache, shell: Shell) -> None:
    """
    Make the environment.

    :raises CommandError: A step failed; there is no entry in the cache.
    """
    result = cache.work("virtme") if shell.dry_run else cache.scratch("virtme")
    shell.run([sys.executable, "-m", "venv", result], what="environment of virtme-ng")
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    shell.run(
        [_python(result), *install, f"virtme-ng=={VERSION}"], what="installation of virtme-ng"
    )
    if not shell.dry_run:
        cache.publish(result, "virtme", _inputs(), now=time.time())


def configure_command(tools: Path, fragment: Path) -> list[str]:
    """Return the command that adds the options of virtme-ng and *fragment* to ``.config``."""
    command = [str(_python(tools)), "-m", "virtme.commands.configkernel"]
    return [*command, "--arch", "x86_64", "--update", "--custom", str(fragment)]


def run_command(tools: Path) -> list[str]:
    """Return the beginning of the command that boots a kernel; its options come after."""
    return [str(_python(tools)), "-m", "virtme.commands.run"]


def _inputs() -> Inputs:
    # The environment points to the interpreter that it was made with; one that is gone or new needs
    # another.
    return {"virtme-ng": VERSION, "python": str(Path(sys.executable).resolve())}


def _python(tools: Path) -> Path:
    return tools / "bin" / "python"
