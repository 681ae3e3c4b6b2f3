# SPDX-License-Identifier: Apache-2.0
"""The job of ``ramblock check``: recordings, audited alone or merged, here or elsewhere."""

from ramblock.check.job import CheckOptions, check_file, check_files, check_merged

__all__ = ["CheckOptions", "check_file", "check_files", "check_merged"]
