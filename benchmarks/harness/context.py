# SPDX-License-Identifier: Apache-2.0
"""What every case is given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from harness.baselines import Baseline

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    """How thoroughly to measure, and with what."""

    quick: bool
    """Few rounds: does everything still run, and what is it about?"""
    folder: Path
    """For files that last as long as the run."""
    baselines: tuple[Baseline, ...]

    @property
    def rounds(self) -> int:
        """How often a measurement is repeated, the contenders taking turns."""
        return 2 if self.quick else 9

    def choose(self, quick: int, full: int) -> int:
        """One of two numbers of samples."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Tell whoever waits what is going on."""
        print(f"bench: {text}", file=sys.stderr, flush=True)
