# SPDX-License-Identifier: Apache-2.0
"""
Fuzz the readers of traces, field by field: no traceback, the fast way like the careful one.

    make fuzz                       # half of its time goes to this
    .venv/bin/python fuzz/readers.py --seconds 600

What is made and what has to hold is in tests/trace_fuzz.py, which the tests play as well. An input
that breaks it is kept in build/fuzz/, by its format and seed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from pathlib import Path
from time import monotonic

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "tests"))

from trace_fuzz import FORMATS, make, play  # noqa: E402

__all__ = ["main"]

#: Seconds for an input of some 400 lines, of 6 KB at most each: the slowest are of 0.1 s.
_MOST = 10


def main() -> int:
    """Play until the time is over; return 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    end = monotonic() + arguments.seconds
    broken = number = 0
    for seed in itertools.count(arguments.first):
        for name in FORMATS:
            data = make(name, seed)
            began = monotonic()
            try:
                play(name, data)
                took = monotonic() - began
                assert took < _MOST, f"{took:.1f} s"
            except Exception:
                broken += 1
                path = _ROOT / "build" / "fuzz" / f"readers-{name}-{seed}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                sys.stderr.write(f"{path}:\n{traceback.format_exc()}\n")
            number += 1
        if monotonic() > end:
            break
    sys.stderr.write(f"readers: {number:,} recordings, {broken} broken\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
