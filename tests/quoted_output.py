"""
Output of ``ramblock check`` that the documentation quotes: found, made anew, compared, written.

It is that of a terminal.

A quotation is a line ``$ ramblock check ...`` with output below it, in a block of its own: indented
(reStructuredText) or between fences (Markdown). The recordings are those of ``tests/data``. A line
``[...]`` stands for lines that are left out; there is at most one.

    .venv/bin/python tests/quoted_output.py     writes all of them anew
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pseudo_terminal import on_terminal

__all__ = ["FILES", "LEFT_OUT", "Quotation", "abridge", "find", "run"]

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "docs/check.rst", "docs/audit-qemu.rst", "docs/audit-kernel.rst")
LEFT_OUT = "[...]"

_PROMPT = "$ ramblock check "
_COLUMNS = 97  # a line of the documentation has at most 100, and 3 are its indentation


class Quotation(NamedTuple):
    """A command and its output, in the lines of a file."""

    start: int
    """Number of the first line of output, from 0."""
    indent: str
    command: str
    output: list[str]
    """Without indentation."""


def find(lines: list[str]) -> Iterator[Quotation]:
    """Yield the quotations of a file that have output."""
    for number, line in enumerate(lines):
        indent, prompt, arguments = line.partition(_PROMPT)
        if not prompt or indent.strip():
            continue
        output = []
        for each in lines[number + 1 :]:
            if each.startswith("```") or (each and not each.startswith(indent)):
                break
            if each.startswith(f"{indent}$ "):
                break
            output.append(each.removeprefix(indent))
        while output and not output[-1]:
            output.pop()
        if output:
            yield Quotation(number + 1, indent, arguments, output)


def run(command: str) -> list[str]:
    """Return the lines that a command prints, without spaces at their ends."""
    done = on_terminal("check", *command.split(), columns=_COLUMNS, cwd=ROOT / "tests/data")
    return [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]


def abridge(output: list[str], quoted: list[str]) -> list[str]:
    """Leave out what a quotation leaves out: as many lines stay at each end as it has."""
    if LEFT_OUT not in quoted:
        return output
    head = quoted.index(LEFT_OUT)
    tail = len(quoted) - head - 1
    if len(output) <= head + tail:
        return output
    return [*output[:head], LEFT_OUT, *(output[-tail:] if tail else [])]


def _write(path: Path) -> None:
    lines = path.read_text().splitlines()
    for each in reversed(list(find(lines))):
        new = [f"{each.indent}{line}".rstrip() for line in abridge(run(each.command), each.output)]
        lines[each.start : each.start + len(each.output)] = new
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for name in FILES:
        _write(ROOT / name)
