# SPDX-License-Identifier: Apache-2.0
"""Logging that a guest cannot flood, whatever it provokes and however often."""

from __future__ import annotations

import logging


class Sparingly:
    """Logs the 1st, 10th, 100th, ... of many like messages, with the count."""

    __slots__ = ("_logger", "_next", "count")

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._next = 1
        self.count = 0  #: Messages so far, logged or not.

    def __call__(self, message: str, *arguments: object) -> None:
        """Log *message*, ``%`` *arguments*, if it is its turn."""
        self.count += 1
        if self.count >= self._next:
            self._next *= 10
            text = "%s (number %d of its kind)"
            self._logger.warning(text, message % arguments, self.count)
