# SPDX-License-Identifier: Apache-2.0
"""The questions, one per module. Each has ``run(context)``, which yields the rows of its table."""
