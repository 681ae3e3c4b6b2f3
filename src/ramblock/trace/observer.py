# SPDX-License-Identifier: Apache-2.0
"""Who wants to see an audit go by: a report, a Perfetto trace."""

from __future__ import annotations

from typing import Protocol

from ramblock.trace.events import Access, ConversionEnd
from ramblock.trace.findings import Finding

__all__ = ["AuditObserver"]


class AuditObserver(Protocol):
    """
    Called in the order of the trace, synchronously.

    Ranges are guest addresses, ``[start, end)`` in bytes.

    Times never fall. Where a trace has none, the number of the event stands for it.
    """

    def page_state(self, time: int, start: int, end: int, *, private: bool) -> None:
        """Note that pages are now private or shared; calls without a change are reported too."""

    def mapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target mapped a range."""

    def unmapped(self, time: int, target: str, start: int, end: int) -> None:
        """Note that a target unmapped a range; parts of it may not have been mapped."""

    def converted(self, event: ConversionEnd) -> None:
        """Note the end of a conversion."""

    def accessed(self, event: Access) -> None:
        """Note a device's access, or its fault."""

    def found(self, finding: Finding) -> None:
        """
        Take a finding that is complete.

        Windows that are open at the end come last, with ``open`` set.
        """
