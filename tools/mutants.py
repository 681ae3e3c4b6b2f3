# SPDX-License-Identifier: Apache-2.0
"""
Break the core, or the audit of traces, one step at a time, and see that the tests notice.

    python -m tools.mutants [--jobs N] [--timeout SECONDS] [--list] [NAME ...]

Each mutant is one change in a copy of ``src/``; the tests named beside it run against the copy,
after they have passed against the code as it is. A NAME chooses the mutants whose name contains it.
Exit code 1 if one survives, or if the place that one changes is not there exactly once any more:
then the list (tools/mutants_of_the_core.py, tools/mutants_of_check.py) has to follow the code.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.mutants_of_check import MUTANTS as MUTANTS_OF_CHECK
from tools.mutants_of_the_core import MUTANTS as MUTANTS_OF_THE_CORE
from tools.mutation import (
    MovedError,
    Mutant,
    changed_tree,
    copy_source,
    is_imported_from,
    run_all,
    run_tests,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ramblock"
MUTANTS: list[Mutant] = [*MUTANTS_OF_THE_CORE, *MUTANTS_OF_CHECK]


def _print_line(verdict: str, seconds: str, name: str, by: str) -> None:
    print(f"{verdict:8}  {seconds:>6}  {name:70.70}  {by}".rstrip(), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that the command line chooses; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description="Break the code, and see that the tests notice."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants whose name contains it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--list", action="store_true", help="list them, and run nothing")
    chosen = parser.parse_args(arguments)
    mutants = [
        mutant
        for mutant in MUTANTS
        if not chosen.names or any(name in mutant.name for name in chosen.names)
    ]
    if not mutants:
        parser.error("no mutant has such a name")
    moved = []
    for mutant in mutants:
        try:
            changed_tree(mutant, ROOT / "src" / PACKAGE)
        except MovedError as error:
            moved.append(str(error))
    if moved:
        print("\n".join(moved), file=sys.stderr)
        return 1
    if chosen.list:
        for mutant in mutants:
            print(f"{mutant.where:55}  {mutant.name}")
        return 0
    began = time.monotonic()
    if not _passes_unchanged(mutants, chosen.timeout):
        return 1
    living = killed = hangs = 0
    for mutant, outcome in run_all(ROOT, PACKAGE, mutants, chosen.jobs, chosen.timeout):
        killed += outcome.dead
        living += not outcome.dead
        hangs += outcome.verdict == "hang"
        _print_line(outcome.verdict, f"{outcome.seconds:.1f} s", mutant.name, outcome.by)
    minutes = (time.monotonic() - began) / 60
    hang = f" ({hangs} hang)" if hangs else ""
    print(f"{len(mutants)} mutants, {killed} killed{hang}, {living} survive; {minutes:.1f} min")
    return int(living > 0)


def _passes_unchanged(mutants: Sequence[Mutant], seconds: float) -> bool:
    """Whether all the tests pass against the code as it is: else killing means nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="unchanged-") as folder:
        source = copy_source(ROOT, Path(folder))
        if not is_imported_from(source, PACKAGE, ROOT):
            print(f"the tests do not import {PACKAGE} from the copy", file=sys.stderr)
            return False
        outcome = run_tests(ROOT, source, tests, seconds * len(tests))
    if outcome.verdict == "SURVIVED":
        return True
    print(f"the tests fail without a mutant: {outcome.by}", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(main())
