# SPDX-License-Identifier: Apache-2.0
"""QEMU's text trace (its ``log`` backend), and other text with its events."""

from __future__ import annotations

from ramblock.trace.readers.hot import FastTextReader
from ramblock.trace.readers.registry import register

register("qemu")(FastTextReader)
