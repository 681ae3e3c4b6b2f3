# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: calls of a run that fail, to show rollback, accounts and poison."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

from ramblock.errors import UsageError

__all__ = ["FaultPlan"]

_EXPECTED = (
    "map:N, unmap:N, unmap:short:N, attribute:N or free:N, with N from 1 up, separated by commas"
)


@dataclass
class FaultPlan:
    """
    Numbers of calls that fail, each kind counted from 1 and from the end of boot on.

    Map and unmap calls are those of the first device's IOMMU.
    """

    fail_map: set[int] = field(default_factory=set)
    fail_unmap: set[int] = field(default_factory=set)
    short_unmap: set[int] = field(default_factory=set)
    fail_attribute: set[int] = field(default_factory=set)
    fail_free: set[int] = field(default_factory=set)
    armed: bool = False
    happened: Counter[str] = field(default_factory=Counter)
    """Failures so far, by kind."""
    _attributes: int = 0
    _frees: int = 0

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """
        Read ``map:3,unmap:short:7``.

        :raises UsageError: It is not like that; the text names the part.
        """
        plan = cls()
        kinds = {
            "map": plan.fail_map,
            "unmap": plan.fail_unmap,
            "unmap:short": plan.short_unmap,
            "attribute": plan.fail_attribute,
            "free": plan.fail_free,
        }
        for part in filter(None, (part.strip() for part in text.split(","))):
            kind, _, number = part.rpartition(":")
            if kind not in kinds or not number.isdecimal() or int(number) < 1:
                raise UsageError(f"inject: {part!r} is not a fault", value=part, expected=_EXPECTED)
            kinds[kind].add(int(number))
        return plan

    def __bool__(self) -> bool:
        return any(
            (self.fail_map, self.fail_unmap, self.short_unmap, self.fail_attribute, self.fail_free)
        )

    def attribute(self) -> None:
        """Count a call that sets attributes; raise if it is to fail."""
        if self.armed:
            self._attributes += 1
            if self._attributes in self.fail_attribute:
                raise self._refusal("attribute", self._attributes)

    def free(self) -> None:
        """Count a free; raise if it is to fail."""
        if self.armed:
            self._frees += 1
            if self._frees in self.fail_free:
                raise self._refusal("free", self._frees)

    def _refusal(self, kind: str, number: int) -> OSError:
        self.happened[kind] += 1
        return OSError(
            errno.ENOMEM, f"{kind} call {number} was told to fail ({os.strerror(errno.ENOMEM)})"
        )
