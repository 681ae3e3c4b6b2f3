# SPDX-License-Identifier: Apache-2.0
"""
One self-contained page: style, data, Plotly and our script in one file.

A policy forbids it the network.

A trace is not trusted: all its names (targets, files, rules) reach the page as JSON, and our
scripts put it there as text.
"""

from __future__ import annotations

import html
from importlib.resources import files
from pathlib import Path

import msgspec

from ramblock.errors import UsageError

__all__ = ["require_plotly", "write_page"]

#: Nothing may be fetched; Plotly sets styles of elements and shows pictures of its own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def require_plotly() -> str:
    """
    Return the source of plotly.js.

    :raises UsageError: The extra ``report`` is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(
            "a report needs Plotly", expected="pip install 'ramblock[report]'"
        ) from None
    return str(get_plotlyjs())


def write_page(path: Path, *, title: str, data: object, body: str, script: str, style: str) -> None:
    """
    Write a page.

    :param data: The script's data, as ``ramblock.data``.
    :param body: HTML; a file of this package.
    :param script: JavaScript; a file of this package.
    :param style: CSS; a file of this package.
    :raises UsageError: Plotly is not installed.
    :raises OSError: The file cannot be written. An older file may be gone.
    """
    plotly = require_plotly()
    # "</script>" inside of a string would end the element: HTML does not read JSON.
    encoded = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # A browser asks for an icon otherwise.
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{_text(style)}</style>",
            "</head>",
            "<body>",
            _text(body),
            f'<script type="application/json" id="data">{encoded}</script>',
            f"<script>{plotly}</script>",
            f"<script>\n{_text(script)}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )
    path.write_text(page, encoding="utf-8")


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
