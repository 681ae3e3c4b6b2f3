# SPDX-License-Identifier: Apache-2.0
"""All the memory of a block at once, piece by piece, so that it can be watched and stopped."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeAlias

from ramblock.hostmem.backing import SharedBacking
from ramblock.hostmem.host_calls import populate
from ramblock.units import MIB, format_size

#: Called after each piece, with the bytes so far and the bytes in total.
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
    Put a page everywhere in *backing*, which nobody uses yet; *what* names it in the message.

    :param hint: The rest of the message: the cause, and the cure.
    :raises OSError: ENOMEM, and how much could be had. The pages so far stay.
    :raises BaseException: From *progress*, or Ctrl-C; likewise.
    """
    done, total = 0, backing.size
    while done < total:
        size = min(max(_PIECE, backing.page_size), total - done)
        try:
            populate(backing.address + done, size)
        except OSError as error:
            there = backing.allocated_bytes()
            had = format_size(done if there is None else there)
            # EFAULT is a page that cannot be had too: without this call it would be a SIGBUS later.
            number = errno.ENOMEM if error.errno == errno.EFAULT else error.errno
            cause = os.strerror(error.errno or 0)
            text = f"{what}: only {had} of {format_size(total)} could be had: {cause}"
            raise OSError(number, "; ".join(filter(None, (text, hint())))) from error
        done += size
        if progress is not None:
            progress(done, total)
