# SPDX-License-Identifier: Apache-2.0
"""The guest's console and the command's output, both into one log, and the kernel's own trouble."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["KernelWatch", "Lines"]

# What a kernel prints when it is broken: after these nothing that a test finds out counts.
_BROKEN = re.compile(
    r"Kernel panic - not syncing: .*"
    r"|Oops: .*"
    r"|BUG: .*"
    r"|kernel BUG at .*"
    r"|general protection fault.*"
    r"|Unable to handle .*"
)
# What it prints when something deserves a look. A stall may be no more than a busy host: the
# guest's clock goes on.
_DUBIOUS = re.compile(
    r"WARNING: CPU: .*"
    r"|WARNING: .* at .*"
    r"|rcu: INFO: .* stall.*"
    r"|INFO: task .* blocked for more than .*"
    r"|watchdog: .* stuck .*"
    r"|Out of memory: Killed process.*"
)


class KernelWatch:
    """
    Reads the console and keeps what the kernel said about its own trouble.

    :ivar broken: Lines of a kernel that is broken, first to last.
    :ivar dubious: Lines that deserve a look.
    :ivar last: The last line that says anything.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.dubious: list[str] = []
        self.last = ""

    def line(self, text: str) -> None:
        """Read one line."""
        self.last = text.strip() or self.last
        # A soft lockup is written as a BUG, but is the host's fault under emulation as often as
        # not.
        if match := _DUBIOUS.search(text):
            self.dubious.append(match[0])
        elif match := _BROKEN.search(text):
            self.broken.append(match[0])


class Lines:
    """
    Cuts a stream of bytes into lines for a log that has another stream in it too.

    :param log: Gets whole lines only.
    :param also: Gets each line's text, without its end.
    """

    def __init__(self, log: BinaryIO, also: Callable[[str], object] | None = None) -> None:
        self._log = log
        self._also = also
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._write(line)

    def end(self) -> None:
        """Write a last line that has no end."""
        if self._partial:
            self._write(self._partial)
        self._partial = b""

    def _write(self, line: bytes) -> None:
        # The serial console ends its lines with \r\n.
        line = line.rstrip(b"\r")
        self._log.write(line + b"\n")
        if self._also is not None:
            self._also(line.decode(errors="replace"))
