# SPDX-License-Identifier: Apache-2.0
"""
The DMA windows of one client, and the rules that its maps and unmaps have to keep.

A call that breaks a rule raises :class:`RuleBroken` and changes nothing.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ramblock.errors import describe_range
from ramblock.probe.files import FileTable, MemoryFile
from ramblock.units import PAGE_SIZE

__all__ = ["Note", "Rule", "RuleBroken", "UnmapRule", "Window", "WindowTable"]

_END = 1 << 64


class UnmapRule(Enum):
    """The rule for an unmap."""

    LENIENT = "lenient"
    """Whole windows, any number of them."""
    EXACT = "exact"
    """
    One window, exactly.

    The specification's rule (VFIO_USER_DMA_UNMAP: "must match exactly a previous mapping"), and
    libvfio-user's (lib/dma.c, dma_controller_remove_region()).
    """


class Rule(Enum):
    """Rules that a client can break."""

    EMPTY = "empty range"
    UNALIGNED = "not whole pages"
    WRAP = "past 2^64"
    OVERLAP = "overlap"
    NO_ACCESS = "no access"
    """A map that lets the device neither read nor write."""
    UNKNOWN = "flags that are not known here"
    CONTRADICTION = "flags that contradict each other"
    NOT_MEMORY = "not memory"
    """A descriptor that no memory can be behind."""
    FILE_ACCESS = "memory that may not be accessed so"
    """The descriptor, or a seal, does not allow the device's access that the map allows."""
    BEYOND_FILE = "past the end of the file"
    TOO_MANY = "too many windows"
    NOT_MAPPED = "unmap of nothing"
    BISECT = "unmap of a part"
    INEXACT = "unmap that is no window"
    """Only where unmaps have to be exact."""
    UNREACHABLE = "memory that is not there"
    """The device touched a window, and the memory behind it could not be had."""
    INTERRUPTS = "interrupts that cannot be set so"
    MESSAGE = "message that makes no sense"
    """The connection goes on."""
    PROTOCOL = "protocol"
    """The connection ended there."""
    EXPECTATION = "windows differ from what is plugged"
    """The windows differ from the VMM's own account."""


class Note(Enum):
    """Things that the probe lets pass, and others may not."""

    INEXACT_UNMAP = "unmap that is no window, which the specification forbids"
    CONFIG_WRITE = "config space written where no register begins, which libvfio-user refuses"


class RuleBroken(Exception):
    """
    A rule was broken, and nothing has changed.

    :ivar rule: Which.
    :ivar errno: The answer to the client.
    """

    def __init__(self, rule: Rule, number: int, text: str) -> None:
        super().__init__(text)
        self.rule = rule
        self.errno = number


@dataclass(eq=False, slots=True)
class Window:
    """A range of addresses that the device may reach."""

    address: int
    size: int
    writable: bool
    readable: bool
    file: MemoryFile | None
    """Where the bytes are; None: the client serves them by message."""
    offset: int
    """First byte in the file."""
    refused_unmap: tuple[int, int] | None = None
    """The refused unmap, as (address, size): the client may believe that the window is gone."""

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.address + self.size

    @property
    def stale(self) -> bool:
        """Whether the client wanted it gone."""
        return self.refused_unmap is not None

    def __str__(self) -> str:
        return describe_range(self.address, self.size)


class WindowTable:
    """
    Windows, disjoint, by address.

    :param rule: The rule for an unmap.
    :param limit: How many there may be.
    """

    def __init__(self, rule: UnmapRule, limit: int) -> None:
        self._rule = rule
        #: How many windows there may be. Lowering it removes none.
        self.limit = limit
        self._starts: list[int] = []
        self._windows: list[Window] = []
        self.files = FileTable()

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def windows(self) -> Sequence[Window]:
        """All of them, ascending. Not a copy."""
        return self._windows

    def add(
        self,
        address: int,
        size: int,
        *,
        readable: bool,
        writable: bool,
        file: MemoryFile | None,
        offset: int,
    ) -> Window:
        """
        Add a window.

        :param file: With a reference for this window, which the caller drops if this raises.
        :raises RuleBroken: A rule forbids it.
        """
        _check(address, size)
        if not (readable or writable):
            raise RuleBroken(Rule.NO_ACCESS, errno.EINVAL, "a window to neither read nor write")
        if file is not None:
            _check_inside(file, offset, size)
            if (refusal := file.refusal(writable=writable)) is not None:
                raise RuleBroken(Rule.FILE_ACCESS, *refusal)
        first, last = self._touching(address, size)
        if first < last:
            raise RuleBroken(
                Rule.OVERLAP, errno.EEXIST, f"{self._windows[first]} is mapped already"
            )
        if len(self._windows) >= self.limit:
            raise RuleBroken(
                Rule.TOO_MANY,
                errno.ENOSPC,
                f"there are {len(self._windows)} windows, as many as may be",
            )
        window = Window(address, size, writable, readable, file, offset)
        self._starts.insert(first, address)
        self._windows.insert(first, window)
        return window

    def remove(self, address: int, size: int) -> list[Window]:
        """
        Remove the windows of a range.

        :return: Those that were removed.
        :raises RuleBroken: A rule forbids it. Windows that lie in the range as a whole stay, and
            are marked as stale.
        """
        _check(address, size)
        first, last = self._touching(address, size)
        named = self._windows[first:last]
        try:
            self._check_unmap(address, size, named)
        except RuleBroken:
            for window in named:
                if address <= window.address and window.end <= address + size:
                    window.refused_unmap = (address, size)
            raise
        self._forget(first, last)
        return named

    def remove_all(self) -> list[Window]:
        """Remove all windows; return them."""
        removed = list(self._windows)
        self._forget(0, len(removed))
        return removed

    def _check_unmap(self, address: int, size: int, named: list[Window]) -> None:
        if not named:
            raise RuleBroken(Rule.NOT_MAPPED, errno.ENOENT, "nothing is mapped there")
        exact = len(named) == 1 and (named[0].address, named[0].size) == (address, size)
        if self._rule is UnmapRule.EXACT and not exact:
            raise RuleBroken(
                Rule.INEXACT,
                errno.ENOENT,
                f"no window is exactly this; {len(named)} are in it: {_few(named)}",
            )
        for window in (named[0], named[-1]):
            if window.address < address or window.end > address + size:
                raise RuleBroken(Rule.BISECT, errno.EINVAL, f"it would cut {window}")

    def _forget(self, first: int, last: int) -> None:
        removed = self._windows[first:last]
        del self._starts[first:last]
        del self._windows[first:last]
        for window in removed:
            if window.file is not None:
                self.files.drop(window.file)

    def _touching(self, address: int, size: int) -> tuple[int, int]:
        """Find the windows that touch a range, as positions [first, last)."""
        first = bisect_right(self._starts, address)
        if first and self._windows[first - 1].end > address:
            first -= 1
        return first, bisect_left(self._starts, address + size, first)

    def translate(self, address: int, size: int, *, write: bool) -> list[tuple[Window, int, int]]:
        """
        Find where an access goes.

        :return: As (window, offset in the window, size), in order; empty: a byte of it may not be
            reached.
        """
        parts = []
        position, end = address, address + size
        first, last = self._touching(address, size)
        for window in self._windows[first:last]:
            allowed = window.writable if write else window.readable
            if window.address > position or not allowed:
                return []
            stop = min(end, window.end)
            parts.append((window, position - window.address, stop - position))
            position = stop
        return parts if position == end else []

    def close(self) -> None:
        """Let go of all memory."""
        self.remove_all()
        self.files.close()


def _check(address: int, size: int) -> None:
    if not size:
        raise RuleBroken(Rule.EMPTY, errno.EINVAL, "the range is empty")
    if address + size > _END:
        raise RuleBroken(Rule.WRAP, errno.EINVAL, f"the range ends behind {_END - 1:#x}")
    if (address | size) % PAGE_SIZE:
        raise RuleBroken(
            Rule.UNALIGNED, errno.EINVAL, f"address and size have to be multiples of {PAGE_SIZE:#x}"
        )


def _check_inside(file: MemoryFile, offset: int, size: int) -> None:
    if offset % PAGE_SIZE:
        raise RuleBroken(
            Rule.UNALIGNED, errno.EINVAL, f"offset {offset:#x} is no multiple of {PAGE_SIZE:#x}"
        )
    length = file.size()
    if offset + size > length:
        raise RuleBroken(
            Rule.BEYOND_FILE,
            errno.EINVAL,
            f"{describe_range(offset, size)} of {Path(file.name).name}, which ends at {length:#x}",
        )


def _few(windows: list[Window]) -> str:
    text = ", ".join(map(str, windows[:3]))
    return text if len(windows) <= 3 else f"{text} ..."
