# SPDX-License-Identifier: Apache-2.0
"""``python -m ramblock``."""

import sys

from ramblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
