# SPDX-License-Identifier: Apache-2.0
"""``python -m lab``."""

import signal
import sys

from lab.cli import main

# As for Ctrl-C: what runs for us ends with us.
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(main())
