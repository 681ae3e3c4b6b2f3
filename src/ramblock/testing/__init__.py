# SPDX-License-Identifier: Apache-2.0
"""
Help for people who test their own VMM or target. Nothing here imports hypothesis.

Two halves that know nothing of each other. The *model* (:class:`GuestModel`) says what devices
ought to reach, given what was asked for. The *verifier* (:class:`Verifier`, in a test
:class:`GuestChecker`) says what was seen at the edges, call by call; the ``Checked...`` wrappers
are these edges. ``ramblock run`` is watched by the same verifier.

With hypothesis (``pip install ramblock[testing]``) there are also strategies
(``ramblock.testing.strategies``) and the checks of a DMA target, a discard source or a listener of
one's own (:mod:`ramblock.testing.conformance`).
"""

from ramblock.testing.checker import GuestChecker, ListedTarget
from ramblock.testing.edges import (
    CheckedInPlace,
    CheckedPrivate,
    CheckedShared,
    CheckedTarget,
    CheckedVm,
)
from ramblock.testing.in_place import SimulatedInPlace
from ramblock.testing.model import GuestModel, ModelBlock, ModelSection, pages_of
from ramblock.testing.targets import FaultyTarget, RecordingTarget
from ramblock.testing.verifier import Region, Verifier
from ramblock.testing.violations import Violation, ViolationKind

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
    "Region",
    "SimulatedInPlace",
    "Verifier",
    "Violation",
    "ViolationKind",
    "pages_of",
]
