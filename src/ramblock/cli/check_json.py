# SPDX-License-Identifier: Apache-2.0
"""
An audit for machines: ``ramblock.check``, version 2.

``docs/check.rst`` describes it. A field may be added; if one goes or changes its meaning, the
version is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ramblock.check.verdict import Judgement, worst
from ramblock.cli.terminal import out
from ramblock.trace.findings import Finding
from ramblock.trace.result import AuditResult

__all__ = ["print_json"]

_SCHEMA, _VERSION = "ramblock.check", 2


def print_json(
    results: Sequence[AuditResult], judgements: Sequence[Judgement], *, strict: bool
) -> None:
    """Print all audits on stdout."""
    total = worst(judgements)
    fields = {
        "verdict": total.verdict,
        "exit_code": total.exit_code,
        "failures": total.failures,
        "strict": strict,
        "audits": [_audit(*each) for each in zip(results, judgements, strict=True)],
    }
    out().json(_SCHEMA, _VERSION, fields)


def _audit(result: AuditResult, judgement: Judgement) -> dict[str, object]:
    fields: dict[str, Any] = {
        "verdict": judgement.verdict,
        "sentence": judgement.sentence,
        "exit_code": judgement.exit_code,
        "failures": judgement.failures,
        # Of every field whose name ends in "_s"; the others that are times have the trace's clock.
        "epoch": {"began": result.began, "unit": "ns", "is": "the first event of the trace"},
        **msgspec.to_builtins(result, str_keys=True),
    }
    for shown, finding in zip(fields["findings"], result.findings, strict=True):
        shown["after_s"] = _seconds(finding, result)
        shown["lasted_s"] = None if finding.duration is None else finding.duration / 1e9
    return fields


def _seconds(finding: Finding, result: AuditResult) -> float | None:
    if finding.since is None or result.began is None:
        return None
    return (finding.since - result.began) / 1e9
