# SPDX-License-Identifier: Apache-2.0
"""``ramblock doctor``: the examination, as a table or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from ramblock.cli.terminal import Cell, Styled, out
from ramblock.cli.terminal import Line as Shown
from ramblock.doctor import Line, Purpose, Status, examine, fitness

__all__ = ["start"]

_STYLES = {
    Status.GOOD: "green",
    Status.NOTE: "",
    Status.LACKING: "bold red",
    Status.UNSEEN: "yellow",
}


def start(arguments: argparse.Namespace) -> int:
    """Examine; return the exit code."""
    lines = examine()
    purpose = None if arguments.purpose is None else Purpose(arguments.purpose)
    in_the_way = [] if purpose is None else fitness(lines, purpose)
    if arguments.json:
        out().json("ramblock.doctor", 1, _fields(lines, purpose, in_the_way))
    else:
        _print_lines(lines)
        if purpose is not None:
            _print_verdict(purpose, in_the_way)
    return 1 if in_the_way else 0


def _fields(
    lines: Sequence[Line], purpose: Purpose | None, in_the_way: Sequence[Line]
) -> dict[str, object]:
    result: dict[str, object] = {"lines": msgspec.to_builtins(lines)}
    if purpose is not None:
        result |= {
            "for": str(purpose),
            "ready": not in_the_way,
            "in_the_way": [line.name for line in in_the_way],
        }
    return result


def _print_lines(lines: Sequence[Line]) -> None:
    rows: list[list[Cell]] = []
    for line in lines:
        cell: list[Shown] = [line.found]
        # Good lines need no words.
        if line.status is not Status.GOOD:
            cell.append(Styled(line.why, "dim"))
        if line.todo:
            cell.append(f"-> {line.todo}")
        rows.append([Styled(line.status, _STYLES[line.status]), line.name, cell])
    out().table(rows)


def _print_verdict(purpose: Purpose, in_the_way: Sequence[Line]) -> None:
    terminal = out()
    terminal.line()
    if not in_the_way:
        terminal.line(f"Ready for {purpose}.")
        return
    terminal.line(f"Not ready for {purpose}:")
    for line in in_the_way:
        todo = f"; {line.todo}" if line.todo else ""
        terminal.line(f"- {line.name}: {line.found}{todo}", hang=2)
