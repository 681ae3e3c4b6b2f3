# SPDX-License-Identifier: Apache-2.0
"""
Do steps in order; if one fails, put all of them back.

A transaction is data: a table of :class:`Step`, each with its undo, run over one or more pieces (a conversion has one
piece per block). The order is step by step, not piece by piece: every piece is unmapped before the first attribute
changes. The undo goes backwards over exactly what was started.

The rules for a step:

- The intent is noted before ``do`` is called, so ``undo`` is also called for a step that failed half-way or was
  interrupted; it must cope with having nothing to put back.
- An undo relies on those that ran before it in the undo. When one fails, the rest is left alone *for that piece*: a page
  that may still be mapped does not get its attribute made private. The other pieces are put back as usual.
- Any exception is a failure, ``KeyboardInterrupt`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from ramblock.memory.guard import Guard

__all__ = ["Failure", "Step", "run_transaction"]

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Step(Generic[P]):
    """One line of a transaction's table."""

    name: str
    do: Callable[[P], None]
    undo: Callable[[P], None]
    stuck: Callable[[P], None] | None = None
    """Called when ``undo`` failed, to make our records say what is true now."""


@dataclass(frozen=True, slots=True)
class Failure(Generic[P]):
    """Why a transaction did not happen. Everything is put back, or the guard is poisoned."""

    step: str
    piece: P
    cause: BaseException

    def reraise(self, guard: Guard, operation: str) -> NoReturn:
        """Raise the cause itself; after a failed undo :class:`~ramblock.errors.PoisonedError`, with the cause chained."""
        if guard.poisoned:
            raise guard.poisoned_error(operation) from self.cause
        raise self.cause


def run_transaction(
    guard: Guard, steps: Sequence[Step[P]], pieces: Sequence[P]
) -> Failure[P] | None:
    """
    Run *steps* over *pieces* under *guard*, whose lock the caller holds.

    :return: None when all of it is done. Otherwise the failure: everything is put back, or the guard is poisoned.
    """
    started: list[tuple[Step[P], P]] = []
    guard.transaction_open = True
    try:
        for step in steps:
            for piece in pieces:
                started.append((step, piece))
                step.do(piece)
    except BaseException as cause:
        _undo(guard, started)
        step, piece = started[-1] if started else (steps[0], pieces[0])
        guard.transaction_open = False
        return Failure(step.name, piece, cause)
    guard.transaction_open = False
    return None


def _undo(guard: Guard, started: list[tuple[Step[P], P]]) -> None:
    stuck: list[P] = []
    for step, piece in reversed(started):
        if any(piece is other for other in stuck):
            continue
        try:
            step.undo(piece)
        except BaseException as error:  # a second Ctrl-C must not leave the rest undone either
            stuck.append(piece)
            guard.poison(f"step {step.name!r} could not be put back: {error!r}")
            if step.stuck is not None:
                _settle(guard, step, piece)


def _settle(guard: Guard, step: Step[P], piece: P) -> None:
    assert step.stuck is not None
    try:
        step.stuck(piece)
    except BaseException as error:  # the other pieces have to be put back all the same
        guard.poison(f"nor do our records of step {step.name!r} say what is true: {error!r}")
