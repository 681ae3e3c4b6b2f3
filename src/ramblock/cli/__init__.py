# SPDX-License-Identifier: Apache-2.0
"""
The command line.

Thin: parse, call the library, print. Data goes to stdout, everything else to stderr.
"""

from ramblock.cli.main import main, make_parser

__all__ = ["main", "make_parser"]
