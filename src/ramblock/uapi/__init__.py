# SPDX-License-Identifier: Apache-2.0
"""
Numbers and layouts of the kernel interfaces that we use: one module for each header.

Only used ones are here. ``tests/lab/test_uapi.py`` compares every number, size and offset with the
headers of the lab's kernel, by a C program made from these modules.
"""
