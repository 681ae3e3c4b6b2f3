# SPDX-License-Identifier: Apache-2.0
"""
Lines that differ in a few fields only, one after the other, all of one length.

A VMM maps page by page, so most of a large recording is such runs. Their fields are columns at
fixed places, and are taken out and converted a column at a time, without a pattern.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

__all__ = ["NEAR", "SHORTEST", "decimals", "find_run", "hexadecimals", "reach"]

#: Lines of a run that is worth its set-up.
SHORTEST = 12
#: Lines that are looked at first.
NEAR = 32
_LONGEST = 8192
_HEX = b"0123456789abcdef"


def find_run(
    block: bytes,
    match: re.Match[bytes],
    groups: Sequence[int],
    most: int,
    *,
    free_from: int | None = None,
) -> tuple[int, list[tuple[bytes, ...]]] | None:
    """
    Find the lines behind a match that are like it.

    :param match: Of a whole line, with its end.
    :param groups: The fields that may differ, in the order of the line.
    :param most: Lines that are looked at; see :func:`reach`.
    :param free_from: From here on in the block, the line's rest may differ as well.
    :return: Their number, and a column for each field; None: there are too few.
    """
    start, end = match.span()
    length = end - start
    most = min((len(block) - end) // length, most)
    ends = block[end + length - 1 : end + most * length : length]
    count = len(ends) - len(ends.lstrip(b"\n"))
    if count < SHORTEST:
        return None
    layout, literals, position = "", [], start
    for group in groups:
        first, behind = match.span(group)
        literals.append(block[position:first])
        layout += f"{first - position}s{behind - first}s"
        position = behind
    rest = end if free_from is None else free_from
    literals.append(block[position:rest])
    layout += f"{rest - position}s{end - rest}x"
    columns = list(zip(*struct.iter_unpack(layout, block[end : end + count * length]), strict=True))
    for literal, column in zip(literals, columns[::2], strict=True):
        if column.count(literal) != len(column):
            count = min(count, _first_other(column, literal))
    if count < SHORTEST:
        return None
    if free_from is not None and block.count(b"\n", end, end + count * length) != count:
        return None
    return count, [column[:count] for column in columns[1::2]]


def reach(most: int, found: int) -> int:
    """
    Return how many lines to look at next time.

    More and more, as long as all are a run: what is looked at in vain is then no more than some
    times what was found, whatever a file holds.
    """
    return min(most * 4, _LONGEST) if found == most else NEAR


def _first_other(column: tuple[bytes, ...], literal: bytes) -> int:
    return next(place for place, text in enumerate(column) if text != literal)


def hexadecimals(column: tuple[bytes, ...]) -> Sequence[int] | None:
    """Read numbers of at most 16 digits; None: one is none."""
    padding = b"0" * (16 - len(column[0]))
    joined = padding + padding.join(column)
    if joined.translate(None, _HEX):
        return None
    return struct.unpack(f">{len(column)}Q", bytes.fromhex(joined.decode()))


def decimals(column: tuple[bytes, ...]) -> list[int] | None:
    """Read numbers; None: one is none."""
    return list(map(int, column)) if b"".join(column).isdigit() else None
