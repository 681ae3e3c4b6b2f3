# SPDX-License-Identifier: Apache-2.0
"""The job of ``ramblock check``: recordings, audited alone or merged, here or elsewhere."""

from ramblock.check.job import CheckOptions, check_file, check_files, check_merged
from ramblock.check.verdict import Judgement, Verdict, judge, worst

__all__ = [
    "CheckOptions", "Judgement", "Verdict", "check_file", "check_files", "check_merged", "judge",
    "worst",
]  # fmt: skip
