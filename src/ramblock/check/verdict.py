# SPDX-License-Identifier: Apache-2.0
"""The verdict on an audit: one word, one sentence and one exit code for text, JSON and HTML."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from ramblock.trace.findings import FAILURES, FindingKind
from ramblock.trace.result import AuditResult
from ramblock.units import format_size

__all__ = ["Judgement", "Verdict", "failing_kinds", "judge", "worst"]


class Verdict(StrEnum):
    """Worst first; of several audits the worst counts."""

    FOUND = "found"
    UNREADABLE = "not read to its end"
    CANNOT_TELL = "cannot tell"
    CLEAN = "no failures"


_EXIT_CODES = {
    Verdict.FOUND: 1,
    Verdict.UNREADABLE: 3,
    Verdict.CANNOT_TELL: 4,
    Verdict.CLEAN: 0,
}
_ORDER = list(Verdict)


class Judgement(NamedTuple):
    """The verdict on one audit or on several."""

    verdict: Verdict
    failures: int
    """Findings that make a check fail."""
    sentence: str
    """The verdict for people, without a full stop."""
    exit_code: int


def failing_kinds(*, strict: bool) -> frozenset[FindingKind]:
    """Return the kinds that make a check fail; the others are notes."""
    return frozenset(FindingKind) if strict else FAILURES


def judge(result: AuditResult, *, strict: bool = False, allow_empty: bool = False) -> Judgement:
    """
    Judge an audit.

    :param strict: Notes are failures too.
    :param allow_empty: A trace of which nothing can be told has exit code 0; the words stay.
    """
    failures = result.failures(strict=strict)
    if failures:
        verdict, sentence = Verdict.FOUND, f"{failures:,} finding{'s' * (failures > 1)}"
        if result.error is not None:
            sentence += " in what was read"
    elif result.error is not None:
        # A part that was read and is clean says nothing of the rest.
        verdict = Verdict.UNREADABLE
        sentence = "Not read to its end" if result.events else "Not read"
        if result.events and not result.cannot_tell:
            sentence += "; nothing found in what was read"
    elif result.cannot_tell:
        verdict, sentence = Verdict.CANNOT_TELL, "Cannot tell"
    else:
        verdict, sentence = Verdict.CLEAN, _clean(result)
    code = 0 if allow_empty and verdict is Verdict.CANNOT_TELL else _EXIT_CODES[verdict]
    return Judgement(verdict, failures, sentence, code)


def worst(judgements: Iterable[Judgement]) -> Judgement:
    """Sum up several audits, at least one; the worst verdict counts, 1 over 3 over 4 over 0."""
    listed = list(judgements)
    first = min(listed, key=lambda each: (_ORDER.index(each.verdict), -each.exit_code))
    failures = sum(each.failures for each in listed)
    return first._replace(failures=failures)


def _clean(result: AuditResult) -> str:
    if result.judged_bytes:
        text = f"Nothing found in {format_size(result.judged_bytes)} of guest pages"
    else:
        text = "No failures, and no guest pages whose state and mappings could be compared"
    if result.began is not None and result.ended is not None:
        text += f" over {(result.ended - result.began) / 1e9:.1f} s"
    return text
