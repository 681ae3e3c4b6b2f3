# SPDX-License-Identifier: Apache-2.0
"""``ramblock explain``: the explanations, as text or as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from ramblock.check.input import STDIN, open_input, read_chunks
from ramblock.cli.terminal import Styled, Terminal, err, out, print_error
from ramblock.explain import Explanation, Known, explain
from ramblock.trace.messages.catalogue import ENTRIES
from ramblock.trace.messages.entry import Entry

__all__ = ["start"]

_SCHEMA, _VERSION = "ramblock.explain", 1
_UNREADABLE, _NOTHING = 3, 4


def start(arguments: argparse.Namespace) -> int:
    """Read a log and explain it; return the exit code."""
    if arguments.list:
        return _list(as_json=arguments.json)
    if arguments.file == STDIN and sys.stdin.isatty():
        err().line("Paste the log; Ctrl-D in a line of its own ends it.")
    with open_input(arguments.file) as stream:
        found = explain(read_chunks(stream, arguments.file))
    code = 0 if found.known else _NOTHING if found.error is None else _UNREADABLE
    if arguments.json:
        out().json(_SCHEMA, _VERSION, _fields(found, code))
    else:
        _print(found)
    if found.error is not None:
        print_error(found.error)
    return code


def _list(*, as_json: bool) -> int:
    terminal = out()
    if as_json:
        terminal.json(_SCHEMA, _VERSION, {"catalogue": [_entry_fields(each) for each in ENTRIES]})
        return 0
    for number, entry in enumerate(ENTRIES):
        if number:
            terminal.line()
        terminal.line(Styled(entry.name, "bold"))
        _print_entry(terminal, entry)
    return 0


def _print(found: Explanation) -> None:
    terminal = out()
    lines = f"{found.lines:,} line{'' if found.lines == 1 else 's'}"
    count = len(found.known)
    if not count:
        terminal.line(f"Nothing known in {lines}; {len(ENTRIES)} messages are (--list).")
        return
    terminal.line(f"{count} known message{'' if count == 1 else 's'} in {lines}:")
    # Several functions of a VMM tell of one failure: that is explained once.
    same: dict[tuple[str, str], list[Known]] = {}
    for known in found.known:
        same.setdefault((known.entry.cause, known.entry.remedy), []).append(known)
    for group in same.values():
        terminal.line()
        for known in group:
            terminal.line(Styled(known.text, "bold"), f" ({_places(known)})", hang=2)
        _print_entry(terminal, *(known.entry for known in group))


def _places(known: Known) -> str:
    more = "" if known.lines == 1 else f" and {known.lines - 1:,} more"
    return f"line {known.first:,}{more}"


def _print_entry(terminal: Terminal, *entries: Entry) -> None:
    """Print an entry, or several of one cause and remedy."""
    known_from = [each.source for each in entries]
    known_from += [address for each in entries for address in each.addresses]
    rows = [
        ("failed", _joined(each.failed for each in entries)),
        ("why", entries[0].cause),
        ("to do", entries[0].remedy),
        ("written by", entries[0].versions),
        ("source", _joined(known_from)),
    ]
    terminal.table([[Styled(f"  {name}", "dim"), text] for name, text in rows])


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _fields(found: Explanation, code: int) -> dict[str, object]:
    return {
        "exit_code": code,
        "lines": found.lines,
        "error": None if found.error is None else str(found.error),
        "messages": [
            {
                "text": known.text,
                "first_line": known.first,
                "lines": known.lines,
                **_entry_fields(known.entry),
            }
            for known in found.known
        ],
    }


def _entry_fields(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "failed": entry.failed,
        "cause": entry.cause,
        "remedy": entry.remedy,
        "versions": entry.versions,
        "source": entry.source,
        "reports": entry.addresses,
    }
