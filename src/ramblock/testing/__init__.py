# SPDX-License-Identifier: Apache-2.0
"""Help for people who test their own VMM or target. Hypothesis strategies are in :mod:`ramblock.testing.strategies`."""

from ramblock.testing.checker import (
    CheckedPrivate,
    CheckedShared,
    CheckedTarget,
    CheckedVm,
    GuestChecker,
    ListedTarget,
)
from ramblock.testing.model import GuestModel, ModelBlock, ModelSection, pages_of
from ramblock.testing.targets import FaultyTarget, RecordingTarget

__all__ = [
    "CheckedPrivate",
    "CheckedShared",
    "CheckedTarget",
    "CheckedVm",
    "FaultyTarget",
    "GuestChecker",
    "GuestModel",
    "ListedTarget",
    "ModelBlock",
    "ModelSection",
    "RecordingTarget",
    "pages_of",
]
