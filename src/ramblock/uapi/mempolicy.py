# SPDX-License-Identifier: Apache-2.0
"""NUMA memory policies of mbind(2)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

HEADER: Final = "linux/mempolicy.h"


class MempolicyMode(IntEnum):
    """Where pages come from."""

    MPOL_PREFERRED = 1
    MPOL_BIND = 2
    MPOL_INTERLEAVE = 3
