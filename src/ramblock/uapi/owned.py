# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with one owner: closed once, never used after that, and named in errors."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod

from ramblock.process import OfOneProcess

__all__ = ["OwnedDescriptor"]


class OwnedDescriptor(OfOneProcess, ABC):
    """
    Owns *fd* from now on, and closes it at the latest when nobody holds this object any more.

    Its number is not handed out after that, so that no call can hit a file that got the same number
    later.

    :param fd: Open; not inheritable from here on (KVM_CREATE_GUEST_MEMFD, alone among its kind,
        does not set FD_CLOEXEC).
    :param name: For messages.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        os.set_inheritable(fd, False)  # noqa: FBT003 - takes no keyword

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._close.alive

    def fileno(self) -> int:
        """
        Tell the number.

        :raises Exception: It is closed; which class, says the part of the library that it belongs
            to.
        """
        if self.closed:
            raise self._closed_error()
        return self._fd

    @abstractmethod
    def _closed_error(self) -> Exception:
        """Say that it is closed, as the part of the library does that it belongs to."""

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        self._close()

    def __repr__(self) -> str:
        return f"<{self.name}, {'closed' if self.closed else self._fd}>"
