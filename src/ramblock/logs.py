# SPDX-License-Identifier: Apache-2.0
"""Logging that a guest cannot flood: what it can provoke as often as it likes is logged sparingly."""

from __future__ import annotations

import logging

__all__ = ["Sparingly"]


class Sparingly:
    """
    Logs the 1st, 10th, 100th, ... of many like messages, with the count.

    :param logger: Where to.
    :param level: As in :mod:`logging`.
    """

    __slots__ = ("_level", "_logger", "_next", "count")

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING) -> None:
        self._logger = logger
        self._level = level
        self._next = 1
        #: How many there were.
        self.count = 0

    def __call__(self, message: str, *arguments: object) -> None:
        """Log it, if it is its turn."""
        self.count += 1
        if self.count >= self._next:
            self._next *= 10
            text = message % arguments
            self._logger.log(self._level, "%s (number %d of its kind)", text, self.count)
