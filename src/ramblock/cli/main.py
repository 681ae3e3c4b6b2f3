# SPDX-License-Identifier: Apache-2.0
"""``ramblock``: the commands, their exit codes, and the messages of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ramblock.cli import (
    check_options,
    doctor_options,
    explain_options,
    plan_options,
    probe_options,
    run_options,
)
from ramblock.cli.terminal import Terminal, out, print_error
from ramblock.errors import RamblockError, TraceError, UsageError
from ramblock.text import printable

__all__ = ["main", "make_parser"]

EXIT_USAGE, EXIT_UNREADABLE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 5, 130
# As of a process that SIGPIPE ended: nobody reads the rest, which is no failure of anything.
_EXIT_CLOSED_PIPE = 141

_EPILOG = """\
exit codes: 0 done and clean, 1 the job found what it looks for (a violation, a plan that does not
fit), 2 usage, 3 unreadable input, 4 cannot tell: nothing that could be judged was seen, 5 the job
itself failed (no memory, disk full, a lost peer), 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Its messages quote the command line; so they go through the terminal's sink too."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            terminal = Terminal(file or sys.stderr)
            for line in message.removesuffix("\n").split("\n"):
                terminal.verbatim(line)


class _Formatter(logging.Formatter):
    """One message is one line, and a traceback several."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


class _Version(argparse.Action):
    """Ask the installation for the version only on demand: that import is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        out().verbatim(f"ramblock {metadata.version('ramblock')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; the commands declare their options in modules that import nothing heavy."""
    parser: argparse.ArgumentParser = _Parser(
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
    explain_options.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    try:
        return _run(argv)
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except TraceError as error:
        return _fail(error, EXIT_UNREADABLE)
    except BrokenPipeError:
        return _give_up_stdout()
    except (RamblockError, OSError, MemoryError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = make_parser().parse_args(argv)
        _log_to_stderr(arguments.log_level)
        code: int = arguments.start(arguments)
    finally:
        sys.stdout.flush()  # here, where it is known what to do if it cannot be
    return code


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(name)s: %(levelname)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _fail(error: BaseException | str, code: int) -> int:
    try:
        print_error(error)
    except BrokenPipeError:
        return _give_up_stdout()
    return code


def _give_up_stdout() -> int:
    # Python flushes stdout once more when it ends, and would complain.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return _EXIT_CLOSED_PIPE
