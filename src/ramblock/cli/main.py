# SPDX-License-Identifier: Apache-2.0
"""``ramblock``: the commands, their exit codes, and the messages of errors."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ramblock.cli import check_options, doctor_options, plan_options, probe_options, run_options
from ramblock.errors import RamblockError, TraceError, UsageError

__all__ = ["main", "make_parser"]

EXIT_FAILED, EXIT_USAGE, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

_EPILOG = """\
exit codes: 0 done and clean, 1 the job found a violation or failed, 2 usage, 3 unreadable input,
130 interrupted
"""


class _Version(argparse.Action):
    """Ask the installation for the version only on demand: that import is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"ramblock {metadata.version('ramblock')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; the commands declare their options in modules that import nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="ramblock",
        description="The memory of confidential VMs: page conversions,"
        " and DMA mappings that stay exactly in step.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error", "critical"),
        default="error",
        help="least severe message of the library that is shown on stderr (default: error)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_options.add_to(commands)
    check_options.add_to(commands)
    probe_options.add_to(commands)
    plan_options.add_to(commands)
    doctor_options.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(name)s: %(levelname)s: %(message)s"
    )
    try:
        code: int = arguments.start(arguments)
        return code
    except UsageError as error:
        return _fail(error, EXIT_USAGE, error.expected)
    except TraceError as error:
        return _fail(error, EXIT_UNREADABLE, None)
    except (RamblockError, OSError) as error:
        return _fail(error, EXIT_FAILED, None)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, None)


def _fail(error: BaseException | str, code: int, expected: str | None) -> int:
    text = f"ramblock: error: {error}"
    if expected is not None and expected not in text:
        text += f", expected {expected}"
    print(text, file=sys.stderr)
    return code
