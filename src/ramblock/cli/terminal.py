# SPDX-License-Identifier: Apache-2.0
"""
All that the commands print: lines, tables, JSON, and what is drawn over on a terminal.

No other module of the commands writes to stdout or stderr. So text of strangers is made printable
in one place, here, where it is written. A line feed in a piece of text is a stranger's: lines of
ours are separate calls.

Only a terminal gets colours, folded lines and pictures. They are drawn by rich, whose import takes
as long as the check of a small file; elsewhere a line is a line, however long.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, TextIO

from ramblock.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress
    from rich.text import Text

__all__ = ["Cell", "Line", "Piece", "Styled", "Terminal", "err", "out", "print_error"]

# In less, rich drops columns of a table.
_NARROWEST = 40


class Styled(NamedTuple):
    """A piece of a line in a style of rich's: ``bold``, ``dim``, ``red``, ..., or several."""

    text: str
    style: str


Piece = str | Styled
Line = Piece | tuple[Piece, ...]
#: One line or several.
Cell = Line | list[Line]


class Terminal:
    """
    One of the two streams.

    :param stream: A terminal, a pipe or a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may not have all our characters
        self._live: Live | None = None
        self._bar: Progress | None = None

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        console = Console(file=self._stream, markup=False, emoji=False, highlight=False)
        if console.width < _NARROWEST:
            console.width = _NARROWEST
        return console

    @property
    def width(self) -> int:
        """Columns of a terminal."""
        return self._console.width

    def line(self, *pieces: Piece, hang: int = 0) -> None:
        """
        Write a line.

        :param hang: Columns by which its continuation is indented, if it has to be folded.
        """
        if not self.is_terminal:
            self._write(_plain(pieces))
            return
        from rich.text import Text

        text = _text(pieces)
        if text.cell_len > self.width:
            text = Text("\n" + " " * hang).join(text.wrap(self._console, self.width - hang))
        self._console.print(text)

    def verbatim(self, line: str) -> None:
        """Write a line of ours with its indentation, as it is: help, a script to be pasted."""
        self._write(printable(line))

    def table(
        self,
        rows: Sequence[Sequence[Cell]],
        *,
        header: Sequence[str] = (),
        right: Collection[int] = (),
    ) -> None:
        """
        Write a table; nothing if it has no rows.

        :param right: Columns whose text stands at the right.
        """
        if not rows:
            return
        cells = [
            [cell if isinstance(cell, list) else [cell] for cell in row]
            for row in ([header] if header else []) + [*rows]
        ]
        if self.is_terminal:
            self._draw_table(cells, right)
            return
        shown = [
            lines
            for row in cells
            for lines in zip_longest(*(map(_plain, cell) for cell in row), fillvalue="")
        ]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for lines in shown:
            columns = [
                line.rjust(width) if number in right else line.ljust(width)
                for number, (line, width) in enumerate(zip(lines, widths, strict=True))
            ]
            self._write("  ".join(columns).rstrip())

    def _draw_table(self, rows: list[list[list[Line]]], right: Collection[int]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for number in range(len(rows[0])):
            table.add_column(justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text("\n").join(map(_text, cell)) for cell in row))
        self._console.print(table)

    def json(self, schema: str, version: int, fields: dict[str, object]) -> None:
        """Write an object, with the name and the version of its schema as its first two fields."""
        from ramblock.text import encode_for_machines

        value = {"schema": schema, "version": version, **fields}
        self._write(encode_for_machines(value, indent=2).decode())

    def _write(self, text: str) -> None:
        self._stream.write(f"{text}\n")

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace what was drawn last; a line that is too wide is cut. On terminals only."""
        from rich.console import Group

        texts = [_text(each) for each in lines]
        for each in texts:
            each.no_wrap, each.overflow = True, "ellipsis"
        self._show(Group(*texts))

    def draw_progress(self, line: str, done: int, total: int | None) -> None:
        """Likewise, a line with a bar if a total is known."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            bar = [BarColumn(), TimeRemainingColumn()] if total is not None else []
            self._bar = Progress(TextColumn("{task.description}", markup=False), *bar)
            self._bar.add_task("", total=total)
        self._bar.update(self._bar.task_ids[0], description=printable(line), completed=done)
        self._show(self._bar.get_renderable())

    def _show(self, picture: RenderableType) -> None:
        from rich.constrain import Constrain
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                # Else results would go where the picture goes.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        # Room for the terminal's own ^C: if that began a line, one line of the picture would stay
        # for good.
        self._live.update(Constrain(picture, self.width - 3), refresh=True)

    def clear(self) -> None:
        """Remove what was drawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def out() -> Terminal:
    """Return stdout, for results."""
    return Terminal(sys.stdout)


def err() -> Terminal:
    """Return stderr, for progress and messages."""
    return Terminal(sys.stderr)


def print_error(error: BaseException | str) -> None:
    """Write an error to stderr, with what was expected where the error knows that."""
    text = str(error) or type(error).__name__
    expected = getattr(error, "expected", None)
    if expected is not None and expected not in text:
        text += f", expected {expected}"
    first, *parts = text.split("\n  - ")  # a list of ours; no other error has several lines
    err().verbatim(f"ramblock: error: {first}")
    for part in parts:
        err().verbatim(f"  - {part}")


def _spans(line: Line) -> list[tuple[str, str]]:
    """Make text printable: this is the one place for it."""
    pieces = (line,) if isinstance(line, str | Styled) else line
    return [
        (printable(piece), "") if isinstance(piece, str) else (printable(piece.text), piece.style)
        for piece in pieces
    ]


def _plain(line: Line) -> str:
    return "".join(text for text, _ in _spans(line))


def _text(line: Line) -> Text:
    from rich.text import Text

    return Text.assemble(*_spans(line))
