# SPDX-License-Identifier: Apache-2.0
"""Lines of our bpftrace script."""

from __future__ import annotations

from ramblock.trace.readers.hot import FastTextReader
from ramblock.trace.readers.registry import register

register("bpftrace")(FastTextReader)
