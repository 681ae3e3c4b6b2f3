# SPDX-License-Identifier: Apache-2.0
"""Things that belong to one process: they are of no use in a fork, and cannot be copied."""

from __future__ import annotations

import os
from typing import NoReturn, Self

from ramblock.errors import UsageError

#: Grows in each fork. A number, since every operation compares it: getpid(2) is a system call.
current = 0


def _note_fork() -> None:
    global current
    current += 1


os.register_at_fork(after_in_child=_note_fork)


class OfOneProcess:
    """Holds something that a copy would share, and close or free twice: TypeError for a copy."""

    # copy.copy, copy.deepcopy and pickle ask here.
    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self!r} holds memory or a device of this process: it cannot be copied")


class ClosedAtEnd(OfOneProcess):
    """Leaving it as a context manager closes it."""

    def close(self) -> None:
        """Give everything back."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def refuse_fork(operation: str) -> NoReturn:
    """Raise :class:`UsageError`: the memory of the *operation* belongs to an ancestor process."""
    # Not even the lock may be tried: the thread that held it at the fork is not in this process.
    raise UsageError(
        f"{operation}: this memory belongs to the process that forked this one; a conversion here"
        " would free its pages under its devices",
        value=os.getpid(),
        expected="a call in the process that made the memory",
    )
