# SPDX-License-Identifier: Apache-2.0
"""
A vfio-user device that any VMM can plug in; it checks the guest memory that a device reaches.

:class:`Probe` is the server. ``ramblock probe`` runs one with a view for people; tests use it as a
context manager.
"""

from ramblock.probe.record import Record, StaleWindow, Violation
from ramblock.probe.server import Probe
from ramblock.probe.windows import Rule, UnmapRule, Window

__all__ = ["Probe", "Record", "Rule", "StaleWindow", "UnmapRule", "Violation", "Window"]
