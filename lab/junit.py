# SPDX-License-Identifier: Apache-2.0
"""The counts of a test run, from the report that pytest writes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

__all__ = ["Counts", "read"]


class Counts(NamedTuple):
    """How many tests ended how."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def read(report: Path) -> Counts | None:
    """
    Return the counts.

    None if there is no whole report, as when the run ended before its time.
    """
    try:
        suites = ET.parse(report).getroot().iter("testsuite")
    except (FileNotFoundError, ET.ParseError):
        return None
    counts = Counts()
    for suite in suites:
        total, failures, errors, skipped = (
            int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
        )
        failed = failures + errors
        counts = Counts(
            counts.passed + total - failed - skipped,
            counts.failed + failed,
            counts.skipped + skipped,
        )
    return counts
