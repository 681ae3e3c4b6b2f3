# SPDX-License-Identifier: Apache-2.0
"""
Sizes, alignment and the check of ranges.

Everything is in bytes and half-open unless a name says ``pages``. Addresses are plain ``int``: Python has no wrap-around,
so a range past 2**64 is seen here, once, and not in every caller.
"""

from __future__ import annotations

import re
from mmap import PAGESIZE

from ramblock.errors import UsageError, describe_range

__all__ = [
    "ADDRESS_LIMIT",
    "GIB",
    "KIB",
    "MIB",
    "PAGE_SIZE",
    "TIB",
    "check_granularity",
    "check_positive",
    "check_range",
    "format_size",
    "parse_size",
]

#: The host's page size in bytes: the granularity of page states (QEMU: qemu_real_host_page_size()).
PAGE_SIZE = PAGESIZE

#: First address that does not exist: guest physical and I/O virtual addresses have 64 bits.
ADDRESS_LIMIT = 1 << 64

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def check_range(start: int, size: int, *, limit: int, align: int, what: str) -> None:
    """
    Check that ``[start, start + size)`` is a non-empty, aligned range below *limit*.

    :param start: First byte.
    :param size: In bytes.
    :param limit: First byte that is outside.
    :param align: Both ends must be multiples of it; 1 for any.
    :param what: Names the range in the message, for instance ``"block 'ram'"``.
    :raises UsageError: With the range in hex and what was expected.
    """
    # In one look what nearly every range is; the message is for the others.
    if (
        type(start) is int
        and type(size) is int
        and start >= 0
        and 0 < size <= limit - start
        and not (start | size) & (align - 1)
    ):
        return
    if not _is_int(start) or not _is_int(size):
        raise UsageError(
            f"{what}: start {start!r} and size {size!r} must be whole numbers of bytes",
            value=(start, size),
            expected="int",
            reason="type",
        )
    if start < 0 or size <= 0:
        raise UsageError(
            f"{what}: start {start:#x} must not be negative and size {size:#x} must be positive",
            value=(start, size),
            expected="a non-empty range",
            reason="empty",
        )
    if start + size > limit:
        raise UsageError(
            f"{what}: {describe_range(start, size)} does not lie in [0x0, {limit:#x})",
            value=(start, size),
            expected=f"inside [0x0, {limit:#x})",
            reason="limit",
        )
    if (start | size) & (align - 1):
        raise UsageError(
            f"{what}: {describe_range(start, size)} is not aligned to {align:#x} bytes",
            value=(start, size),
            expected=f"multiples of {align:#x}",
            reason="alignment",
        )


def _is_int(value: object) -> bool:
    # True is an int too, and as an address or a size it is a mistake.
    return type(value) is int or (isinstance(value, int) and not isinstance(value, bool))


def check_granularity(granularity: int, what: str) -> None:
    """Raise :class:`UsageError` unless *granularity* is a power of two of at least one byte."""
    if not _is_int(granularity) or granularity <= 0 or granularity & (granularity - 1):
        raise UsageError(
            f"{what}: granularity {granularity!r} is not a power of two",
            value=granularity,
            expected="a power of two, in bytes",
        )


def check_positive(number: int, what: str) -> None:
    """Raise :class:`UsageError` unless *number* is a whole number of at least one."""
    if not _is_int(number) or number <= 0:
        raise UsageError(
            f"{what} {number!r} is not a positive number", value=number, expected="at least 1"
        )


def format_size(size: int) -> str:
    """Write a size for people, exact where a unit divides it: ``4 KiB``, ``1.5 GiB``, ``12 B``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}" if size % unit == 0 else f"{size / unit:.1f} {name}"
    return f"{size} B"


# A B behind a hexadecimal number is one of its digits.
_SIZE = re.compile(
    r"(0x[0-9a-f]{1,40}|[0-9]{1,40})\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII
)
_SUFFIXES = {None: 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(text: str) -> int:
    """
    Read a size such as ``4096``, ``64K``, ``2MiB``, ``4G`` or ``0x1000`` (powers of two, as in QEMU).

    :raises UsageError: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a size",
            value=text,
            expected="a number of bytes, or one with K, M, G or T",
        )
    number, suffix = match.groups()
    base = 16 if number[:2] in ("0x", "0X") else 10
    return int(number, base) * _SUFFIXES[suffix and suffix.upper()]
