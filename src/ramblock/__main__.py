# SPDX-License-Identifier: Apache-2.0
"""``python -m ramblock``."""

import sys

from ramblock.cli import main

sys.exit(main())
