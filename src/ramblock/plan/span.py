# SPDX-License-Identifier: Apache-2.0
"""A number that is not known exactly: at least, at most, and most likely."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ramblock.errors import UsageError

__all__ = ["Span"]


class Span(msgspec.Struct, frozen=True):
    """Whole numbers with ``low <= expected <= high``."""

    low: int
    expected: int
    high: int

    @classmethod
    def exactly(cls, number: int) -> Span:
        """Make one of a number that is known."""
        return cls(number, number, number)

    @classmethod
    def between(cls, low: int, high: int) -> Span:
        """Make one whose most likely value is not known: the middle stands for it."""
        if low > high:
            raise UsageError(f"{low} to {high}", value=(low, high), expected="the smaller first")
        return cls(low, (low + high) // 2, high)

    @property
    def exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def at_most(self, other: Span) -> Span:
        """Return the smaller at each end."""
        return Span(
            min(self.low, other.low),
            min(self.expected, other.expected),
            min(self.high, other.high),
        )

    def each(self, function: Callable[[int], int]) -> Span:
        """Apply a function that never falls."""
        return Span(function(self.low), function(self.expected), function(self.high))

    def __str__(self) -> str:
        return f"{self.low:,}" if self.exact else f"{self.low:,}..{self.high:,}"
