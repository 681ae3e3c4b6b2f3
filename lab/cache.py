# SPDX-License-Identifier: Apache-2.0
"""
The folder of what has been built: ``$XDG_CACHE_HOME/ramblock-lab`` or ``~/.cache/ramblock-lab``.

    kernel/KEY/  qemu/KEY/ ...   finished entries, each with a manifest.json
    work/                        builds that go on or were interrupted, and their downloads
    logs/                        one log per run of the VM and per step of a build
    lock                         held by the one process that builds

An entry is named for its inputs, so a changed input makes another entry beside the old one. It is
put together under ``work/`` and gets its place by one rename: whatever is there is whole, however
the build ended. A build that was interrupted leaves its work, and the next one goes on from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = ["Cache", "Entry", "Inputs", "key_of"]

# What an entry is built from, by name.
Inputs: TypeAlias = Mapping[str, str]

_MANIFEST = "manifest.json"


def key_of(inputs: Inputs) -> str:
    """Name the folder of a build from *inputs*: the same in each run, another for other inputs."""
    text = json.dumps(dict(inputs), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished build."""

    path: Path
    inputs: Inputs
    built: float
    """When it was finished, in seconds since the epoch."""


class Cache:
    """
    The finished builds, and the places for those that go on.

    :param root: The cache's folder; it need not exist. Without it, the user's.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramblock-lab"
        self.root = root.absolute()
        self.logs = self.root / "logs"

    def find(self, kind: str, inputs: Inputs) -> Entry | None:
        """
        Return the newest entry that was built from *inputs*, or None.

        *inputs* may leave out some that entries have: a kernel is found whichever version of its
        source was current.
        """
        matching = [e for e in self.entries(kind) if inputs.items() <= e.inputs.items()]
        return max(matching, key=lambda entry: entry.built, default=None)

    def entries(self, kind: str) -> Iterator[Entry]:
        """Yield all finished builds of *kind*."""
        for manifest in sorted((self.root / kind).glob(f"*/{_MANIFEST}")):
            fields = json.loads(manifest.read_text())
            yield Entry(path=manifest.parent, inputs=fields["inputs"], built=fields["built"])

    def work(self, name: str) -> Path:
        """Return the place of a build that goes on; an interrupted build's work is still there."""
        return self.root / "work" / name

    def scratch(self, name: str) -> Path:
        """Return a place of :meth:`work` as an empty folder: for what cannot be resumed."""
        path = self.work(name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def publish(self, work: Path, kind: str, inputs: Inputs, *, now: float) -> Entry:
        """
        Make the finished folder *work* an entry.

        Until the rename there is no entry, after it there is a whole one.

        :param now: Seconds since the epoch.
        """
        (work / _MANIFEST).write_text(json.dumps({"inputs": dict(inputs), "built": now}, indent=2))
        # Without it the rename could reach the disk before the files' contents do.
        os.sync()
        path = self.root / kind / key_of(inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # somebody removed its manifest
            shutil.rmtree(path)
        work.rename(path)
        return Entry(path=path, inputs=inputs, built=now)

    def remove(self, path: Path) -> None:
        """Remove an entry. Its manifest goes first: what is left after an interruption is none."""
        (path / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)

    @contextmanager
    def lock(self) -> Iterator[int]:
        """
        Hold the right to build; wait while another process has it.

        Yields a file descriptor that carries the lock.

        A child that inherits the descriptor keeps the lock: a compiler run that outlives a killed
        build is waited for as well, instead of having company in its folder.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def is_locked(self) -> bool:
        """Tell whether somebody is building."""
        try:
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False
