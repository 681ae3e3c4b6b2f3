# SPDX-License-Identifier: Apache-2.0
"""
What can go wrong with the lab itself.

That a command or a test failed inside it is no error of the lab.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "EXIT_LAB",
    "CommandError",
    "KernelOptionsError",
    "LabError",
    "LostVmError",
    "MissingPackagesError",
]


EXIT_LAB = 125
"""
Exit code that no command of people's own has: the lab failed, not what ran in it.

``git bisect run`` skips on it.
"""


class LabError(Exception):
    """
    The root: the lab could not do its work.

    What was built before is kept, and the next build goes on from there.
    """


class CommandError(LabError):
    """
    A program that the lab started failed.

    :ivar status: Its exit code; negative for the signal that ended it.
    :ivar log: Where its whole output is; None if it was not kept.
    """

    def __init__(self, what: str, status: int, tail: str, log: Path | None) -> None:
        text = f"{what}: exit code {status}"
        if log is not None:
            text += f"; all of its output is in {log}"
        if tail:
            text += f"; it ended with\n{tail}"
        super().__init__(text)
        self.status = status
        self.log = log


class MissingPackagesError(LabError):
    """
    The machine lacks packages, and only root may install them.

    :ivar packages: Their names in Debian, as the message gives them to ``apt-get install``.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(
            f"this machine lacks packages; as root: apt-get install {' '.join(packages)}"
        )
        self.packages = tuple(packages)


class KernelOptionsError(LabError):
    """
    The kernel's configuration came out without options that the lab needs.

    :ivar options: What the fragment asks for and what there is instead, as lines of a ``.config``.
    """

    def __init__(self, options: Sequence[tuple[str, str]]) -> None:
        lines = "\n".join(f"  wanted {wanted}, got {got}" for wanted, got in options)
        super().__init__(f"the kernel did not take {len(options)} of the lab's options:\n{lines}")
        self.options = tuple(options)


class LostVmError(LabError):
    """
    The virtual machine ended, or had to be ended, before the command: its result is not known.

    :ivar log: The run's log: kernel messages and the command's output so far.
    """

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"the VM was lost: {reason}; see {log}")
        self.reason = reason
        self.log = log
