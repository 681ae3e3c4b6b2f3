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
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from ramblock.errors import UsageError
from ramblock.text import encode_for_people, printable

__all__ = ["require_plotly", "write_page"]

#: Nothing may be fetched; Plotly sets styles of elements and shows pictures of its own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def require_plotly() -> bytes:
    """
    Return the source of plotly.js.

    :raises UsageError: The extra ``report`` is not installed.
    """
    # One file of it is needed, and the package is slow to import.
    try:
        spec = find_spec("plotly")
    except ValueError:
        spec = None  # it is in sys.modules, and is none
    for folder in (spec and spec.submodule_search_locations) or ():
        source = Path(folder) / "package_data" / "plotly.min.js"
        if source.is_file():
            return source.read_bytes()
    raise UsageError("a report needs Plotly", expected="pip install 'ramblock[report]'")


def write_page(
    stream: IO[bytes], *, title: str, data: object, body: str, script: str, style: str
) -> None:
    """
    Write a page. Whatever it shows is made printable here.

    :param data: The script's data, as ``ramblock.data``.
    :param body: HTML; a file of this package.
    :param script: JavaScript; a file of this package.
    :param style: CSS; a file of this package.
    :raises UsageError: Plotly is not installed.
    :raises OSError: It cannot be written.
    """
    plotly = require_plotly()
    # "</script>" inside of a string would end the element: HTML does not read JSON.
    encoded = encode_for_people(data).replace(b"<", b"\\u003c")
    head = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # A browser asks for an icon otherwise.
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(printable(title))}</title>",
            f"<style>\n{_text(style)}</style>",
            "</head>",
            "<body>",
            _text(body),
        ]
    )
    # Megabytes: they are written as they are.
    stream.writelines(
        [
            head.encode(),
            b'\n<script type="application/json" id="data">', encoded,
            b"</script>\n<script>", plotly,
            f"</script>\n<script>\n{_text(script)}</script>\n</body>\n</html>\n".encode(),
        ]
    )  # fmt: skip


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
