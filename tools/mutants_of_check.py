# SPDX-License-Identifier: Apache-2.0
"""Mutants of `ramblock check`: the modules that tools/mechanical.py breaks, and telling ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["PARTS", "Part"]


class Part(NamedTuple):
    """Modules that have their tests in common."""

    modules: Sequence[str]
    tests: Sequence[str]
    """The quickest first."""
    equivalent: Mapping[str, str] = {}
    """Mutants that nobody can tell from the code as it is, by name, with the reason."""


PARTS = {
    "audit": Part(
        modules=(
            "trace.audit",
            "trace.conversions",
            "trace.faults",
            "trace.guest_audit",
            "trace.join",
            "trace.judge",
            "trace.limits",
            "trace.mappings",
            "trace.places",
            "trace.ranges",
            "trace.result",
        ),
        tests=(
            "tests/trace/test_audit.py",
            "tests/trace/test_limits.py",
            "tests/trace/test_guests.py",
            "tests/trace/test_conversions.py",
            "tests/trace/test_faults.py",
            "tests/trace/test_ranges.py",
            "tests/trace/test_audit_model.py::test_any_order_of_any_events",
            "tests/trace/test_joined.py",
            "tests/test_qemu_verdicts.py",
        ),
    ),
}
