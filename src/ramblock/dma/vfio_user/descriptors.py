# SPDX-License-Identifier: Apache-2.0
"""
Descriptors as plain numbers with one owner at a time.

Nothing here makes a system call: the receiver of a descriptor hands in the way to close it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

__all__ = ["CloseDescriptor", "Descriptors"]

#: Closes a descriptor: ``os.close``.
CloseDescriptor = Callable[[int], object]


class Descriptors:
    """
    Descriptors that this object owns, in the order in which they came.

    :meth:`close` closes those that nobody took, at the latest when nobody holds this object any
    more.

    :param numbers: They belong to this object from now on.
    :param close: Closes one.
    """

    __slots__ = ("_close", "_numbers")

    def __init__(self, numbers: Iterable[int], close: CloseDescriptor) -> None:
        self._close = close
        self._numbers = list(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers, which still belong to this object."""
        return iter(tuple(self._numbers))

    def take(self, index: int = 0) -> int:
        """
        Hand one out: from now on it is the caller's to close.

        :raises IndexError: There is none.
        """
        return self._numbers.pop(index)

    def take_all(self) -> list[int]:
        """Hand all of them out."""
        taken, self._numbers = self._numbers, []
        return taken

    def close_from(self, limit: int) -> int:
        """Close those behind the first *limit*; tell how many they were."""
        count = max(0, len(self._numbers) - limit)
        for _ in range(count):
            self._close(self._numbers.pop())
        return count

    def close(self) -> None:
        """Close those that nobody took; nothing happens the second time."""
        while self._numbers:
            self._close(self._numbers.pop())

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Descriptors {self._numbers}>"
