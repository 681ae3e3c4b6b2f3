# SPDX-License-Identifier: Apache-2.0
"""What is measured, one module per question. Each has ``run(context)``, which yields the rows of its table."""
