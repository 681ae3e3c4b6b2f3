# SPDX-License-Identifier: Apache-2.0
"""What the cases are built from: requests, contenders, measuring."""
