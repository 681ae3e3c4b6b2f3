# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks; ``--help`` lists the options, README.md says what the numbers mean."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from cases import (
    against,
    against_check,
    attach,
    check,
    checkerboard,
    convert,
    main_thread,
    plan,
    policy,
    replay,
    reset,
    sections,
    sources,
    startup,
    state_change,
    threads,
    translation,
    whole_check,
)
from harness.baselines import Baseline, build
from harness.context import Context
from harness.machine import Machine
from harness.ours import RecordingListener, confidential_block, expect
from harness.requests import random_mix
from harness.rows import Row
from report.plot import plot
from report.promises import Promise, promises
from report.results import Results
from report.tables import markdown, text

CASES: dict[str, ModuleType] = {
    "start-up": startup,
    "state-change": state_change,
    "checkerboard": checkerboard,
    "replay": replay,
    "sources": sources,
    "policy": policy,
    "convert": convert,
    "sections": sections,
    "main-thread": main_thread,
    "threads": threads,
    "attach": attach,
    "reset": reset,
    "translation": translation,
    "check": check,
    "whole-check": whole_check,
    "plan": plan,
}

# Where programs are compiled to; in the folder that `make clean` removes.
_BUILD = Path(__file__).parent.parent / "build" / "bench"


def main() -> int:
    """Measure, write the files that were asked for, and print the tables."""
    # A shell lets its background jobs ignore SIGINT; then an operation has nothing to hold back.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = _parser().parse_args()
    machine = Machine.here()
    with tempfile.TemporaryDirectory(prefix="ramblock-bench-") as folder:
        try:
            rows = _rows(arguments, Path(folder))
        except (FileNotFoundError, RuntimeError) as error:
            print(f"bench: error: {error}", file=sys.stderr)
            return 1
    results = Results(rows)
    # A comparison of versions promises nothing.
    kept = promises(results) if arguments.against is None else []
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(_as_json(machine, rows, kept, quick=arguments.quick))
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text("\n".join(markdown(machine, results, kept)) + "\n")
    if arguments.plot is not None:
        plot(results, arguments.plot)
    print("\n".join(text(machine, results, kept)))
    return 0


def _rows(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """
    Measure what was asked for.

    :raises FileNotFoundError: There is no gcc, or nothing where the other version should be.
    :raises RuntimeError: The other version could not be measured.
    """
    if arguments.against is not None:
        if not (arguments.against / "ramblock").is_dir():
            raise FileNotFoundError(f"{arguments.against} has no package ramblock in it")
        context = Context(arguments.quick, folder, ())
        compared = {"convert": against, "check": against_check}
        wanted = arguments.case or list(compared)
        return [
            row
            for name, case in compared.items()
            if name in wanted
            for row in case.run(context, arguments.against)
        ]
    baselines = build(_BUILD)
    context = Context(arguments.quick, folder, baselines)
    _agree(context, baselines)
    return list(_measure(context, arguments.case or list(CASES)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description="Measure ramblock beside the published algorithm, in one run."
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, about a minute")
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="only this; may be given several times"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="SRC",
        help="compare with the version whose package lies in SRC, in turn: convert and check",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything for machines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the short table")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw cost over VM size: .svg, .png or .pdf"
    )
    return parser


def _agree(context: Context, baselines: tuple[Baseline, ...]) -> None:
    """Let all contenders do the same random conversions: no time counts if they disagree."""
    context.say("do all contenders do the same?")
    for seed in range(context.choose(3, 20)):
        requests = random_mix(16_384, 500, seed)
        file = requests.write(context.folder / "random")
        expected = expect(requests)
        for baseline in baselines:
            expected.compare(baseline.run(file), baseline, requests)


def _measure(context: Context, cases: list[str]) -> Iterator[Row]:
    # What is imported late and cached by the first block is nobody's cost.
    with confidential_block(1 << 21, RecordingListener()):
        pass
    for name in cases:
        yield from CASES[name].run(context)


def _as_json(machine: Machine, rows: list[Row], kept: list[Promise], *, quick: bool) -> str:
    content = {
        "quick": quick,
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
        "promises": [entry._asdict() for entry in kept],
    }
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
