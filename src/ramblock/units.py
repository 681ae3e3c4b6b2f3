# SPDX-License-Identifier: Apache-2.0
"""Sizes, alignment, ranges: in bytes and half-open, unless a name says ``pages``."""

from __future__ import annotations

import re
from mmap import PAGESIZE

from ramblock.errors import UsageError, describe_range

#: The host's page, in bytes: the granularity of states (QEMU: qemu_real_host_page_size()).
PAGE_SIZE = PAGESIZE
#: First address that does not exist: guest physical and I/O virtual addresses have 64 bits. An int
#: does not wrap around, so check_range() sees a range past it.
ADDRESS_LIMIT = 1 << 64
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
#: Makes a NamedTuple without its own constructor, a function in Python: half the time of it.
new_tuple = tuple.__new__


def check_range(start: int, size: int, *, limit: int, align: int, what: str) -> None:
    """
    Check that ``[start, start + size)``, in bytes, is not empty, aligned and below *limit*.

    :param align: Both ends must be multiples of it; 1 for any.
    :param what: Names the range in the message, for instance ``"block 'ram'"``.
    :raises UsageError: With the range in hex, the expected one and the reason.
    """
    # Nearly every range passes in this one look (a conversion checks several); the rest is words.
    if (
        type(start) is int
        and type(size) is int
        and start >= 0
        and 0 < size <= limit - start
        and not (start | size) & (align - 1)
    ):
        return
    if not _is_int(start) or not _is_int(size):
        reason, expected = "type", "int"
        wrong = f"start {start!r} and size {size!r} must be whole numbers of bytes"
    elif start < 0 or size <= 0:
        reason, expected = "empty", "a non-empty range"
        wrong = f"start {start:#x} must not be negative and size {size:#x} must be positive"
    elif start + size > limit:
        reason, expected = "limit", f"inside [0x0, {limit:#x})"
        wrong = f"{describe_range(start, size)} does not lie in [0x0, {limit:#x})"
    elif (start | size) & (align - 1):
        reason, expected = "alignment", f"multiples of {align:#x}"
        wrong = f"{describe_range(start, size)} is not aligned to {align:#x} bytes"
    else:
        return  # a subclass of int, such as an enum's member
    raise UsageError(f"{what}: {wrong}", value=(start, size), expected=expected, reason=reason)


def _is_int(value: object) -> bool:
    # True is an int too, and as an address or a size it is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def check_granularity(granularity: int, what: str) -> None:
    """Raise :class:`UsageError` unless *granularity* is a power of two, in bytes."""
    if not _is_int(granularity) or granularity <= 0 or granularity & (granularity - 1):
        text = f"{what}: granularity {granularity!r} is not a power of two"
        raise UsageError(text, value=granularity, expected="a power of two, in bytes")


def check_positive(number: int, what: str) -> None:
    """Raise :class:`UsageError` unless *number* is a whole number of at least one."""
    if not _is_int(number) or number <= 0:
        text = f"{what} {number!r} is not a positive number"
        raise UsageError(text, value=number, expected="at least 1")


# Largest first: a size is written in the first unit that it reaches.
_UNITS = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB}


def format_size(size: int) -> str:
    """Write a size for people, exact where a unit divides it: ``4 KiB``, ``1.5 GiB``, ``12 B``."""
    for name, unit in _UNITS.items():
        if size >= unit:
            return f"{size // unit} {name}" if size % unit == 0 else f"{size / unit:.1f} {name}"
    return f"{size} B"


# A B behind a hexadecimal number is one of its digits. At most 40 digits: int() of a long string is
# quadratic (CVE-2020-10735).
_SIZE = re.compile(
    r"(0x[0-9a-f]{1,40}|[0-9]{1,40})\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Read a size as QEMU does: ``4096``, ``64K``, ``2MiB``, ``4G``, ``0x1000``; or UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        expected = "a number of bytes, or one with K, M, G or T"
        raise UsageError(f"{text!r} is not a size", value=text, expected=expected)
    number, suffix = match.groups()
    factor = _UNITS[f"{suffix.upper()}iB"] if suffix else 1
    return int(number, 16 if number[:2] in ("0x", "0X") else 10) * factor
