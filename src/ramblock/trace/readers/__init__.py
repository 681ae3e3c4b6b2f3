# SPDX-License-Identifier: Apache-2.0
"""
Readers of traces: one file for each format, and what they share.

:mod:`~ramblock.trace.readers.registry` has them by name, :mod:`~ramblock.trace.readers.detect`
finds out which one a file needs, :mod:`~ramblock.trace.readers.base` is a new one's beginning.
"""
