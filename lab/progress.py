# SPDX-License-Identifier: Apache-2.0
"""The display of a long step: its name, its progress, and its time."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress", "clock"]

# A terminal's line is rewritten; a log file gets another line each time, so fewer of them.
_TERMINAL_INTERVAL_S = 0.5
_FILE_INTERVAL_S = 30.0


def clock(seconds: float) -> str:
    """Write a duration as people do: ``12s``, ``3m07s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """
    The line about one step.

    On a terminal it is written again and again, elsewhere every half minute.
    """

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._terminal = self._stream.isatty()
        self._due = self._started + (0 if self._terminal else _FILE_INTERVAL_S)
        if not self._terminal:
            self._write("")

    def update(self, detail: str) -> None:
        """Show *detail*, if it is time to show something again."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + (_TERMINAL_INTERVAL_S if self._terminal else _FILE_INTERVAL_S)
            self._write(
                f"{detail}, {clock(now - self._started)}" if detail else clock(now - self._started)
            )

    def end(self, verdict: str) -> None:
        """Write the line for the last time."""
        self._write(f"{verdict}, {clock(time.monotonic() - self._started)}")
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, detail: str) -> None:
        line = f"lab: {self._what}" + (f": {detail}" if detail else "")
        # \r and "erase to the end of the line"
        self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
        self._stream.flush()
