# SPDX-License-Identifier: Apache-2.0
"""The form of an entry of the catalogue, and the parts of patterns."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ADDRESS", "HEX", "Entry"]

#: A number in hex, which is captured.
HEX = r"0x([0-9a-fA-F]{1,16})(?![0-9a-fA-F])"
#: The same without its prefix, as some kernels write it.
ADDRESS = r"(?:0x)?([0-9a-fA-F]{1,16})(?![0-9a-fA-F])"


class Entry(NamedTuple):
    """
    A message that is known.

    A pattern is searched in lines of strangers, so each of its repetitions has a bound. Two entries
    do not match the same message: the general one excludes what the special ones have.
    """

    name: str
    """Its name for machines. It stays, whatever the message is changed to."""
    mark: str
    """Words that stand in each of its lines; where they are missing the pattern is not tried."""
    words: str
    """The pattern. The groups that it captures are read by the readers of traces."""
    failed: str
    """What failed."""
    cause: str
    versions: str
    """Who writes it: the versions that were looked at, or that a report names."""
    remedy: str
    source: str
    """The file of the program's source, and the function where it is known."""
    reports: tuple[str, ...] = ()
    """Public reports of it, as ``owner/repository#number``."""
    about: str = ""
    """
    What failed, for the audit of a trace; empty: it says nothing about mappings or conversions.

    ``map``, ``unmap``, ``discard``, ``conversion``, ``slot``, ``device``, or ``call``: the newest
    map or unmap.
    """
    place: str = ""
    """What the groups are: ``range`` start and size, ``offset`` the same inside a block."""
    evidence: bool = True
    """Whether it tells of a mapping or conversion that failed; others are limits of the trace."""

    @property
    def addresses(self) -> list[str]:
        """The reports as addresses of pages."""
        return [
            f"https://github.com/{repository}/issues/{number}"
            for repository, _, number in (report.partition("#") for report in self.reports)
        ]
