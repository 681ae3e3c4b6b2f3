# SPDX-License-Identifier: Apache-2.0
"""Help for people who test their own VMM or target. Hypothesis strategies are in :mod:`ramblock.testing.strategies`."""

from ramblock.testing.checker import (
    CheckedInPlace,
    CheckedPrivate,
    CheckedShared,
    CheckedTarget,
    CheckedVm,
    GuestChecker,
    ListedTarget,
)
from ramblock.testing.in_place import SimulatedInPlace
from ramblock.testing.model import GuestModel, ModelBlock, ModelSection, pages_of
from ramblock.testing.targets import FaultyTarget, RecordingTarget

__all__ = [
    "CheckedInPlace",
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
    "SimulatedInPlace",
    "pages_of",
]
