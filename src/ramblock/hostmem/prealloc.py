# SPDX-License-Identifier: Apache-2.0
"""Taking all the memory of a block at once, piece by piece, so that it can be watched and stopped."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeAlias

from ramblock.hostmem.backing import SharedBacking
from ramblock.hostmem.host_calls import populate
from ramblock.units import MIB, format_size

__all__ = ["Progress", "preallocate"]

#: Called with the bytes that are there and the bytes in total, after each piece.
Progress: TypeAlias = Callable[[int, int], object]

# Ctrl-C waits for one piece: tens of milliseconds for this much, and a huge page at least.
_PIECE = 64 * MIB


def preallocate(
    backing: SharedBacking,
    what: str,
    progress: Progress | None = None,
    *,
    hint: Callable[[], str] = str,
) -> None:
    """
    Put a page everywhere in *backing*, which nobody uses yet.

    :param what: Names it in the message.
    :param hint: What else to say of a failure, and what to do.
    :raises OSError: ENOMEM, and how much could be had. What there is stays; whoever made *backing* closes it.
    :raises BaseException: What *progress* raised, or Ctrl-C; likewise.
    """
    done, total = 0, backing.size
    piece = max(_PIECE, backing.page_size)
    while done < total:
        size = min(piece, total - done)
        try:
            populate(backing.address + done, size)
        except OSError as error:
            there = backing.allocated_bytes()
            had = format_size(done if there is None else there)
            # EFAULT is a page that cannot be had too: without this call it would be a SIGBUS later.
            number = errno.ENOMEM if error.errno == errno.EFAULT else error.errno
            text = f"{what}: only {had} of {format_size(total)} could be had: {error.strerror}"
            raise OSError(number, "; ".join(filter(None, (text, hint())))) from error
        done += size
        if progress is not None:
            progress(done, total)
