# SPDX-License-Identifier: Apache-2.0
"""
All that the commands print: lines, tables, JSON, and what is drawn over on a terminal.

No other module of the commands writes to stdout or stderr. So text of strangers is made printable
in one place, here, where it is written. A line feed in a piece of text is a stranger's: lines of
ours are separate calls.

Colours and folded lines are for terminals. Elsewhere a line is a line, however long, unless
``COLUMNS`` says how many columns there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from ramblock.text import printable

__all__ = ["Cell", "ClosedPipe", "Line", "Piece", "Styled", "Terminal", "err", "out", "print_error"]

_SGR = {"bold": "1", "dim": "2", "reverse": "7", "red": "31", "green": "32", "yellow": "33"}
_GAP = "  "
_NARROWEST, _USUAL = 12, 80


class ClosedPipe(Exception):
    """Nobody reads what a command prints."""


class Styled:
    """A piece of a line in a style: ``bold``, ``dim``, ``red``, ..., or several."""

    __slots__ = ("style", "text")

    def __init__(self, text: str, style: str) -> None:
        self.text = text
        self.style = style


Piece = str | Styled
Line = Piece | tuple[Piece, ...]
#: One line or several.
Cell = Line | list[Line]

_Spans = list[tuple[str, str]]


class Terminal:
    """
    One of the two streams.

    :param stream: A terminal, a pipe or a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._colours = (
            self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        #: Columns; None: as many as a line needs.
        self.width = self._find_width()
        self._drawn = 0

    def _find_width(self) -> int | None:
        told = os.environ.get("COLUMNS", "")
        if told.isdecimal() and len(told) < 6 and int(told):
            return max(int(told), _NARROWEST)
        if not self.is_terminal:
            return None
        try:
            return max(os.get_terminal_size(self._stream.fileno()).columns, _NARROWEST)
        except OSError:
            return _USUAL

    def line(self, *pieces: Piece, hang: int = 0) -> None:
        """
        Write a line.

        :param hang: Columns by which its continuation is indented, if it has to be folded.
        """
        folded = _fold(_spans(pieces), self.width, hang)
        text = "\n".join(" " * (hang if number else 0) + self._dress(spans)
                         for number, spans in enumerate(folded))  # fmt: skip
        self._write(text + "\n")

    def verbatim(self, line: str) -> None:
        """Write a line of ours with its indentation, as it is: help, a script to be pasted."""
        self._write(f"{printable(line)}\n")

    def table(
        self,
        rows: Sequence[Sequence[Cell]],
        *,
        header: Sequence[str] = (),
        right: Collection[int] = (),
        folds: Collection[int] = (-1,),
    ) -> None:
        """
        Write a table; nothing if it has no rows.

        :param right: Columns whose text stands at the right.
        :param folds: Columns that get narrower where the whole is too wide.
        """
        if not rows:
            return
        lines = [
            [_paragraphs(cell) for cell in row] for row in ([header] if header else []) + [*rows]
        ]
        widths = self._widths(lines, {fold % len(rows[0]) for fold in folds})
        for row in lines:
            cells = [
                [part for spans in cell for part in _fold(spans, width)]
                for cell, width in zip(row, widths, strict=True)
            ]
            for number in range(max(map(len, cells))):
                self._row(cells, number, widths, right)

    def _row(
        self, cells: list[list[_Spans]], number: int, widths: list[int], right: Collection[int]
    ) -> None:
        text = ""
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            spans = cell[number] if number < len(cell) else []
            padding = " " * (width - _length(spans))
            shown = self._dress(spans)
            text += (padding + shown if column in right else shown + padding) + _GAP
        self._write(text.rstrip() + "\n")

    def _widths(self, rows: list[list[list[_Spans]]], folds: Collection[int]) -> list[int]:
        widths = [
            max(_length(spans) for row in rows for spans in row[column] or [[]])
            for column in range(len(rows[0]))
        ]
        if self.width is not None:
            spare = self.width - len(_GAP) * (len(widths) - 1) - sum(widths)
            # The widest gives first.
            for column in sorted(folds, key=lambda each: -widths[each]):
                if spare < 0:
                    narrower = max(min(widths[column], _NARROWEST), widths[column] + spare)
                    spare += widths[column] - narrower
                    widths[column] = narrower
        return widths

    def json(self, schema: str, version: int, fields: dict[str, object]) -> None:
        """Write an object, with the name and the version of its schema as its first two fields."""
        from ramblock.text import encode_for_machines

        value = {"schema": schema, "version": version, **fields}
        self._write(encode_for_machines(value, indent=2).decode() + "\n")

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace what was drawn last; a line that is too wide is cut. On terminals only."""
        if not self.is_terminal:
            return
        up = f"\033[{self._drawn}A" if self._drawn else ""
        width = self.width or _USUAL
        # Room for the terminal's own ^C: if that began a line, one line of the picture would stay
        # for good.
        shown = [self._dress(_cut(_spans(each), width - 3)) for each in lines]
        self._write(f"\r{up}\033[J" + "".join(f"{each}\n" for each in shown), now=True)
        self._drawn = len(lines)

    def clear(self) -> None:
        """Remove what was drawn."""
        if self._drawn:
            self.draw([])

    def _dress(self, spans: _Spans) -> str:
        if not self._colours:
            return "".join(text for text, _ in spans)
        return "".join(
            f"\033[{';'.join(_SGR[name] for name in style.split())}m{text}\033[0m"
            if style and text
            else text
            for text, style in spans
        )

    def _write(self, text: str, *, now: bool = False) -> None:
        stream = self._stream
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                # Its encoding has not all of our own characters.
                stream.write(
                    text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
                )
            if now:
                stream.flush()
        except BrokenPipeError as error:
            raise ClosedPipe from error


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


def _spans(line: Line) -> _Spans:
    """Make text printable: this is the one place for it."""
    pieces = line if isinstance(line, tuple) else (line,)
    return [
        (printable(piece), "") if isinstance(piece, str) else (printable(piece.text), piece.style)
        for piece in pieces
    ]


def _paragraphs(cell: Cell) -> list[_Spans]:
    return [_spans(line) for line in (cell if isinstance(cell, list) else [cell])]


def _length(spans: _Spans) -> int:
    return sum(len(text) for text, _ in spans)


def _cut(spans: _Spans, width: int) -> _Spans:
    if _length(spans) <= width:
        return spans
    return [*_slice(spans, 0, width - 1), ("…", "")]


def _fold(spans: _Spans, width: int | None, hang: int = 0) -> list[_Spans]:
    if width is None or _length(spans) <= width:
        return [spans]
    text = "".join(piece for piece, _ in spans)
    return [_slice(spans, start, end) for start, end in _breaks(text, width, hang)]


def _breaks(text: str, width: int, hang: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a line: between words, or where a word is wider than the line."""
    start = 0
    while len(text) - start > width:
        cut = text.rfind(" ", start + 1, start + width + 1)
        yield start, start + width if cut < 0 else cut
        start = start + width if cut < 0 else cut + 1
        if hang:
            width, hang = max(width - hang, 1), 0
    yield start, len(text)


def _slice(spans: _Spans, start: int, end: int) -> _Spans:
    found = []
    at = 0
    for text, style in spans:
        part = text[max(start - at, 0) : max(end - at, 0)]
        if part:
            found.append((part, style))
        at += len(text)
    return found
