# SPDX-License-Identifier: Apache-2.0
"""What becomes of the rows: tables, the promises, the picture."""
