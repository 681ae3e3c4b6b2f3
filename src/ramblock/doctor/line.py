# SPDX-License-Identifier: Apache-2.0
"""One thing that a host has or lacks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec

__all__ = ["Line", "Purpose", "Status", "read_text"]


class Purpose(StrEnum):
    """The purpose of the host."""

    VFIO = "vfio"
    IOMMUFD = "iommufd"
    KVM = "kvm"
    LAB = "lab"


class Status(StrEnum):
    """How it stands."""

    GOOD = "good"
    #: Neither good nor bad: it depends on the guest.
    NOTE = "note"
    LACKING = "lacking"
    #: It could not be looked at: not by this user, or not on this kernel.
    UNSEEN = "unseen"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the examination."""

    name: str
    """Always the same for the same thing."""
    status: Status
    found: str
    why: str
    """Why it matters."""
    todo: str = ""
    """The remedy; empty if none is needed."""
    needed_for: tuple[Purpose, ...] = ()
    """It has to be good for these."""


def read_text(path: Path) -> str | None:
    """Read a file of /sys or /proc; None: it is not there, or not for us."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
