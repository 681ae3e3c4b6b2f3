# SPDX-License-Identifier: Apache-2.0
"""Our own trace format (docs/trace-format.rst): one JSON object per line."""

from ramblock.trace.writer import TRACE_VERSION, TraceWriter

__all__ = ["TRACE_VERSION", "TraceWriter"]
