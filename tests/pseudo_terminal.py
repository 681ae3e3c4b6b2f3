"""Commands whose stdout is a terminal, and a terminal in memory."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["Screen", "on_terminal"]


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def picture(self) -> str:
        """All but our own colours and movements."""
        return re.sub(r"\x1b\[(\?25[hl]|[0-9;]*[mAK])|\r", "", self.getvalue())


def on_terminal(
    *arguments: str, columns: int, kind: str = "dumb", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run ``ramblock``; its stderr is a pipe.

    :param kind: ``TERM``; a dumb terminal shows no colours.
    """
    screen, stdout = pty.openpty()
    size = {"COLUMNS": str(columns), "LINES": "50"}
    with subprocess.Popen(
        [sys.executable, "-m", "ramblock", *arguments],
        cwd=cwd,
        env={**os.environ, **size, "TERM": kind},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(stdout)
        shown = bytearray()
        try:
            while data := os.read(screen, 1 << 16):
                shown += data
        except OSError:
            pass  # EIO: nobody has the other end any more
        os.close(screen)
        assert process.stderr is not None
        errors = process.stderr.read()
    text = shown.decode().replace("\r\n", "\n")
    return subprocess.CompletedProcess(arguments, process.returncode, text, errors)
