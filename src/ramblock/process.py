# SPDX-License-Identifier: Apache-2.0
"""Things that belong to one process: they are of no use in a fork, and cannot be copied."""

from __future__ import annotations

import os
from typing import NoReturn

from ramblock.errors import UsageError

__all__ = ["OfOneProcess", "current", "is_forked", "refuse_fork"]

#: Grows in each fork. A plain number, since it is compared in every operation: getpid(2) would
#: cost a system call there.
current = 0


def _note_fork() -> None:
    global current
    current += 1


os.register_at_fork(after_in_child=_note_fork)


class OfOneProcess:
    """
    Holds descriptors, mappings or locks that a copy would share, and close or free twice.

    ``copy.copy``, ``copy.deepcopy`` and ``pickle`` raise :class:`TypeError`; all three ask here.
    """

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self!r} holds memory or a device of this process: it cannot be copied")


def is_forked(process: int) -> bool:
    """Whether :data:`current` was *process* in an ancestor of this process, not here."""
    return process != current


def refuse_fork(operation: str) -> NoReturn:
    """Raise the error of an *operation* on what belongs to an ancestor of this process."""
    # Not even the lock may be tried: the thread that held it while it forked is not in this process.
    raise UsageError(
        f"{operation}: this memory belongs to the process that forked this one; a conversion here"
        " would free its pages under its devices",
        value=os.getpid(),
        expected="a call in the process that made the memory",
    )
