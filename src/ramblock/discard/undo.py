# SPDX-License-Identifier: Apache-2.0
"""
The undo log of one operation.

An operation is a function that makes its steps through the log; if one fails, all of them are put
back, latest first::

    with UndoLog(guard, "map") as undo:
        undo.do("attribute", set_attributes, unset_attributes)
        undo.do("map", replay.tell, replay.take_back)

The rules:

- The intent is noted before a step is made. So its undo is also called where it failed half-way, and
  copes with having nothing to put back. Whatever a step raises is a failure, of any class.
- An undo relies on those that ran before it. When one fails the memory is poisoned, and the steps
  before it are left alone *for that piece*: a page that may still be mapped does not get its
  attribute made private. Its siblings, which are of the same step, and the other pieces are put back.
- A step may have a function ``stuck``. It is called when its undo failed, and makes our records say
  what is true now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias

from ramblock.discard.guard import Guard

__all__ = ["Entry", "UndoLog", "put_back"]


#: A step that was begun: its name, its piece, the functions ``undo`` and ``stuck``, their arguments.
Entry: TypeAlias = tuple[
    str, object, Callable[..., object], Callable[..., object] | None, tuple[object, ...]
]


def put_back(guard: Guard, entries: Sequence[Entry]) -> None:
    """Undo *entries*, latest first; an undo that fails poisons, and nothing is raised."""
    stuck_at: list[tuple[object, str]] = []
    for step, piece, undo, stuck, arguments in reversed(entries):
        if any(piece is other and step != name for other, name in stuck_at):
            continue
        try:
            undo(*arguments)
        except BaseException as error:  # the rest has to be put back all the same
            stuck_at.append((piece, step))
            guard.poison(f"step {step!r} could not be put back: {error!r}")
            if stuck is None:
                continue
            try:
                stuck(*arguments)
            except BaseException as failure:
                guard.poison(f"nor do our records of step {step!r} say what is true: {failure!r}")


class UndoLog:
    """
    What of an operation may have happened.

    As a context manager it puts everything back when the block raises, and lets the exception go on;
    where putting back failed it raises :class:`~ramblock.errors.PoisonedError` from it.

    :param guard: Whose lock the caller holds.
    :param operation: For messages.
    """

    __slots__ = ("_entries", "_guard", "_operation")

    def __init__(self, guard: Guard, operation: str) -> None:
        self._guard = guard
        self._operation = operation
        self._entries: list[Entry] = []

    def do(
        self,
        step: str,
        do: Callable[..., object],
        undo: Callable[..., object],
        *arguments: object,
        piece: object = None,
        stuck: Callable[..., object] | None = None,
    ) -> None:
        """
        Make one step: ``do(*arguments)``, which ``undo(*arguments)`` puts back.

        :param step: For messages.
        :param piece: What it is a step of, where the operation has several parts.
        :param stuck: See the module.
        """
        self._entries.append((step, piece, undo, stuck, arguments))
        do(*arguments)

    def drop_last(self) -> None:
        """Forget the latest step: it is certain that nothing of it happened."""
        self._entries.pop()

    def put_back(self) -> None:
        """Undo all of it; an undo that fails poisons, and nothing is raised."""
        put_back(self._guard, self._entries)

    def __enter__(self) -> UndoLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.put_back()
            if self._guard.poisoned:
                raise self._guard.poisoned_error(self._operation) from error
