# SPDX-License-Identifier: Apache-2.0
"""The option ``--format``: its choices are the readers that are installed."""

from __future__ import annotations

from argparse import ArgumentTypeError

__all__ = ["trace_format"]


def trace_format(text: str) -> str:
    """
    Check a format's name; only then are the names looked up, since help has to come at once.

    :raises ArgumentTypeError: There is no such format.
    """
    from ramblock.trace.readers.registry import names

    if text not in names():
        raise ArgumentTypeError(f"{text!r}, expected one of {', '.join(names())}")
    return text
