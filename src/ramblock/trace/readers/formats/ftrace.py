# SPDX-License-Identifier: Apache-2.0
"""The kernel's trace as text: tracefs, and ``trace-cmd report``."""

from __future__ import annotations

from ramblock.trace.readers.hot import FastTextReader
from ramblock.trace.readers.registry import register

register("ftrace")(FastTextReader)
