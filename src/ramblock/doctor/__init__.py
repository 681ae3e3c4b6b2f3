# SPDX-License-Identifier: Apache-2.0
"""
The job of ``ramblock doctor``: this host's support for confidential guests and devices.

It looks, and changes nothing.
"""

from ramblock.doctor.examination import Purpose, examine, fitness
from ramblock.doctor.line import Line, Status

__all__ = ["Line", "Purpose", "Status", "examine", "fitness"]
