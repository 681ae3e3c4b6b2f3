# SPDX-License-Identifier: Apache-2.0
"""
The undo log of one operation.

An operation is a function that makes its steps through the log; if one fails, all of them are put
back, latest first::

    with UndoLog(guard, "map") as undo:
        undo.do("attribute", set_attributes, unset_attributes)
        undo.do("map", replay.tell, replay.take_back)

The rules:

- The intent is noted before a step is made. So its undo is also called where it failed half-way,
  and copes with having nothing to put back. Whatever a step raises is a failure, of any class.
- An undo relies on those that ran before it. When one fails the memory is poisoned, and the steps
  before it are left alone *for that piece*: a page that may still be mapped does not get its
  attribute made private. Its siblings, which are of the same step, and the other pieces are put
  back.
- A step may have a function ``stuck``. It is called when its undo failed, and makes our records say
  the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ramblock.discard.guard import Guard
from ramblock.errors import describe_error

_Function: TypeAlias = Callable[..., object]
#: A step that was begun: its name, its piece, the functions ``undo`` and ``stuck``, arguments.
Entry: TypeAlias = tuple[str, object, _Function, _Function | None, tuple[object, ...]]


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
            guard.poison(f"step {step!r} could not be put back: {describe_error(error)}")
            if stuck is None:
                continue
            try:
                stuck(*arguments)
            except BaseException as failure:
                text = describe_error(failure)
                guard.poison(f"nor do our records of step {step!r} say what is true: {text}")


class UndoLog:
    """
    The steps of *operation* that may have happened. The caller holds the lock of *guard*.

    As a context manager it puts everything back when its body raises, and lets the exception go on;
    where putting back failed it raises :class:`~ramblock.errors.PoisonedError` from it.
    """

    def __init__(self, guard: Guard, operation: str) -> None:
        self._guard = guard
        self._operation = operation
        self._entries: list[Entry] = []

    def do(
        self,
        step: str,
        do: _Function,
        undo: _Function,
        *arguments: object,
        piece: object = None,
        stuck: _Function | None = None,
    ) -> None:
        """Make a *step* of a *piece*: ``do(*arguments)``, which ``undo(*arguments)`` puts back."""
        self._entries.append((step, piece, undo, stuck, arguments))
        do(*arguments)

    def drop_last(self) -> None:
        """Forget the latest step: it is certain that nothing of it happened."""
        self._entries.pop()

    def __enter__(self) -> UndoLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            put_back(self._guard, self._entries)
            if self._guard.poisoned:
                raise self._guard.poisoned_error(self._operation) from error
