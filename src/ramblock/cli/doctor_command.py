# SPDX-License-Identifier: Apache-2.0
"""``ramblock doctor``: the examination, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
        print(json.dumps(_as_json(lines, purpose, in_the_way), indent=2))
    else:
        _print_lines(lines)
        if purpose is not None:
            _print_verdict(purpose, in_the_way)
    return 1 if in_the_way else 0


def _as_json(
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
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for line in lines:
        text = Text(line.found)
        # Good lines need no words.
        if line.status is not Status.GOOD:
            text.append(f"\n{line.why}", style="dim")
        if line.todo:
            text.append(f"\n-> {line.todo}")
        table.add_row(Text(line.status, _STYLES[line.status]), line.name, text)
    console.print(table)


def _print_verdict(purpose: Purpose, in_the_way: Sequence[Line]) -> None:
    if not in_the_way:
        print(f"\nReady for {purpose}.")
        return
    print(f"\nNot ready for {purpose}:")
    for line in in_the_way:
        print(f"- {line.name}: {line.found}" + (f"; {line.todo}" if line.todo else ""))
