# SPDX-License-Identifier: Apache-2.0
"""
Files that the commands write.

None is an input or another output under any name (:func:`refuse_shared`), and each appears whole or
not at all (:class:`OutputFile`). A trace that a run or a probe writes is followed while it grows,
so it is written in place; for it the first rule holds alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from ramblock.errors import RamblockError, UsageError

__all__ = ["OutputFile", "open_page", "refuse_shared"]

_STDIN = "-"
_Identity = tuple[int | str, ...]


def refuse_shared(outputs: Mapping[str, Path | None], inputs: Iterable[str | Path | None]) -> None:
    """
    Refuse an output that is the same file as an input, as another output or as stdout.

    Opens nothing. A file is the same through links of both kinds, ``/dev/stdin``, another spelling,
    or as the place of a file that is not there yet.

    :param outputs: By option; None: not asked for.
    :param inputs: ``-`` is standard input.
    :raises UsageError: Names both.
    """
    taken: dict[_Identity, str] = {}
    for each in inputs:
        identity = None if each is None else _identify(each)
        if identity is not None:
            taken[identity] = f"the input {each}"
    named = {f"{option} {path}": path for option, path in outputs.items() if path is not None}
    for name, path in [("standard output", None), *named.items()]:
        identity = _identify_stdout() if path is None else _identify(path)
        if identity is not None and identity in taken:
            raise UsageError(
                f"{name} is the same file as {taken[identity]}",
                value=None if path is None else str(path),
                expected="another file",
            )
        if identity is not None:
            taken[identity] = name


def _identify(path: str | Path) -> _Identity | None:
    try:
        status = os.fstat(0) if path == _STDIN else os.stat(path)  # noqa: PTH116 - also for bytes that are no UTF-8
    except OSError:
        place = Path(os.path.realpath(path))
        try:
            folder = place.parent.stat()
        except OSError:
            return None  # opening it tells
        return folder.st_dev, folder.st_ino, place.name
    # /dev/null and a terminal may be all of them.
    return None if stat.S_ISCHR(status.st_mode) else (status.st_dev, status.st_ino)


def _identify_stdout() -> _Identity | None:
    try:
        status = os.fstat(1)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


class OutputFile:
    """
    A file that is written beside its place, and put there when its ``with`` block ends well.

    Else an older file stays as it was. It gets the permissions that open(2) would leave or give. A
    special file (a pipe, ``/dev/stdout``) is written directly.

    :param option: For messages.
    :raises UsageError: It cannot be written there.
    """

    def __init__(self, option: str, path: Path) -> None:
        self._name = f"{option} {path}"
        self._place = Path(os.path.realpath(path))
        self._beside: Path | None = None
        try:
            #: Where to write.
            self.stream: IO[bytes] = self._open(path)
        except OSError as error:
            raise UsageError(f"{self._name}: {error.strerror}", value=str(path)) from error

    def _open(self, path: Path) -> IO[bytes]:
        try:
            old = path.stat()
        except FileNotFoundError:
            return self._open_beside(None)
        if stat.S_ISREG(old.st_mode):
            return self._open_beside(old)
        if stat.S_ISSOCK(old.st_mode) and os.path.samestat(old, os.fstat(1)):
            return os.fdopen(os.dup(1), "wb")  # a socket cannot be opened by its name
        return path.open("wb")

    def _open_beside(self, old: os.stat_result | None) -> IO[bytes]:
        if old is not None and not os.access(self._place, os.W_OK):
            raise PermissionError(0, "Permission denied")
        beside = self._place.with_name(f".ramblock-{os.urandom(6).hex()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._beside = beside
        if old is not None:
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                _give_to(descriptor, old)
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
        return os.fdopen(descriptor, "wb")

    def __enter__(self) -> IO[bytes]:
        return self.stream

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stream.close()
            if self._beside is not None and error is None:
                self._beside.replace(self._place)
                self._beside = None
        except BrokenPipeError:
            raise
        except OSError as failed:
            if error is None:
                raise RamblockError(f"{self._name}: {failed.strerror}") from failed
        finally:
            if self._beside is not None:
                self._beside.unlink(missing_ok=True)


def open_page(option: str, path: Path) -> OutputFile:
    """
    Open the file of a page with pictures, before the work is done.

    :raises UsageError: It cannot be written, or Plotly is not installed.
    """
    from ramblock.report.html import require_plotly

    require_plotly()
    return OutputFile(option, path)


def _give_to(descriptor: int, old: os.stat_result) -> None:
    try:
        os.fchown(descriptor, old.st_uid, old.st_gid)
    except PermissionError:
        return  # then it is ours
