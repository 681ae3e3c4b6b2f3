# SPDX-License-Identifier: Apache-2.0
"""x"""

from ramblock.trace.readers.text import TextReader


class FastTextReader(TextReader):
    """x"""
