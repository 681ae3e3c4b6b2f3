# SPDX-License-Identifier: Apache-2.0
"""Help for people who test their own VMM or target. Hypothesis strategies are in :mod:`ramblock.testing.strategies`."""

from ramblock.testing.targets import FaultyTarget, RecordingTarget

__all__ = ["FaultyTarget", "RecordingTarget"]
