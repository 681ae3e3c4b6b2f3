# SPDX-License-Identifier: Apache-2.0
"""The examination: all lines, and their meaning for a purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ramblock.doctor import iommu, kernel, kvm, lab, memory
from ramblock.doctor.line import Line, Purpose, Status

__all__ = ["Purpose", "examine", "fitness"]

_ROOT = Path("/")


def examine(root: Path = _ROOT) -> list[Line]:
    """
    Look at everything, and change nothing.

    The one mapping that is made (whether iommufd cuts) is of our own memory, in an address space
    without a device, and is thrown away.

    :param root: Where /dev, /proc and /sys are.
    """
    parts = (kernel.look, kvm.look, iommu.look, memory.look, lab.look)
    return [line for look in parts for line in look(root)]


def fitness(lines: Sequence[Line], purpose: Purpose) -> list[Line]:
    """Return the obstacles to a purpose: needed lines that are lacking, or could not be seen."""
    return [
        line
        for line in lines
        if purpose in line.needed_for and line.status in (Status.LACKING, Status.UNSEEN)
    ]
