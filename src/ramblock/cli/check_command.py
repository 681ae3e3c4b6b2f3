# SPDX-License-Identifier: Apache-2.0
"""``ramblock check``: options, the audits, their findings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence

from ramblock.check.input import STDIN
from ramblock.check.job import CheckOptions, check_file, check_files, check_merged
from ramblock.check.readers import ReaderOptions
from ramblock.check.verdict import Judgement, judge, worst
from ramblock.cli.check_json import print_json
from ramblock.cli.check_outputs import Outputs
from ramblock.cli.check_summary import print_result, print_verdict
from ramblock.cli.outputs import refuse_shared
from ramblock.cli.progress import counting
from ramblock.cli.terminal import out, print_error
from ramblock.errors import UsageError
from ramblock.trace.events import Block
from ramblock.trace.result import AuditResult
from ramblock.units import parse_size

__all__ = ["start"]

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}


def start(arguments: argparse.Namespace) -> int:
    """Audit; return the exit code."""
    if arguments.how is not None:
        from ramblock.cli.check_how import HOW

        terminal = out()
        for line in HOW[arguments.how].splitlines():
            terminal.verbatim(line)
        return 0
    _check_usage(arguments)
    refuse_shared({"--report": arguments.report, "--perfetto": arguments.perfetto}, arguments.file)
    results: list[AuditResult] = []
    judgements: list[Judgement] = []
    title = ", ".join(arguments.file)
    with Outputs(arguments.report, arguments.perfetto, title) as outputs:
        for result in _audits(arguments, outputs):
            judgement = judge(result, strict=arguments.strict, allow_empty=arguments.allow_empty)
            results.append(result)
            judgements.append(judgement)
            outputs.finish(result, judgement, strict=arguments.strict)
            if not result.events and result.error is not None:
                print_error(result.error)
            if not arguments.json:
                print_result(result, judgement, strict=arguments.strict)
    if arguments.json:
        print_json(results, judgements, strict=arguments.strict)
    elif len(results) > 1:
        print_verdict(judgements)
    return worst(judgements).exit_code


def _check_usage(arguments: argparse.Namespace) -> None:
    files = arguments.file
    if not files:
        raise UsageError("nothing to check", expected="a recording; --how tells how to make one")
    if len(set(files)) != len(files):
        raise UsageError("a file is given twice", value=files)
    if arguments.offset and not arguments.merge:
        raise UsageError("--offset without --merge", expected="both")
    together = arguments.merge or len(files) == 1
    if (arguments.report or arguments.perfetto) and not together:
        raise UsageError(
            f"--report and --perfetto with {len(files)} files", expected="one file, or --merge"
        )
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}", value=arguments.jobs, expected="at least 1")
    if arguments.scheduler is not None and (arguments.merge or STDIN in files):
        raise UsageError("--scheduler spreads files", expected="files, and no --merge")


def _audits(arguments: argparse.Namespace, outputs: Outputs) -> Iterator[AuditResult]:
    options = _options(arguments)
    files: list[str] = arguments.file
    if arguments.scheduler is not None:
        from ramblock.check.cluster import check_on_cluster

        yield from check_on_cluster(files, options, arguments.scheduler)
        return
    if not arguments.merge and len(files) > 1:
        jobs = arguments.jobs or len(os.sched_getaffinity(0))
        yield from check_files(files, options, 1 if STDIN in files else jobs)
        return
    with counting("events", quiet=arguments.quiet) as progress:
        if arguments.merge:
            offsets = _offsets(arguments.offset, files)
            result = check_merged(files, options, offsets, outputs.observer, progress)
        else:
            result = check_file(files[0], options, outputs.observer, progress)
    yield result


def _options(arguments: argparse.Namespace) -> CheckOptions:
    block = arguments.virtio_mem_block
    return CheckOptions(
        grace=_nanoseconds(arguments.grace, "--grace"),
        unmap=arguments.unmap,
        layout=tuple(_block(text) for text in arguments.layout),
        reader=ReaderOptions(
            format=arguments.format,
            virtio_mem_block_size=None if block is None else parse_size(block),
        ),
    )


def _nanoseconds(text: str, option: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s)?", text, re.ASCII)
    if match is None:
        raise UsageError(f"{option} {text}", value=text, expected="a time such as 10ms or 0.5s")
    number, unit = match.groups()
    return round(float(number) * _UNITS[unit or "s"])


def _block(text: str) -> Block:
    match = re.fullmatch(r"(.+)=([^+@]+)\+([^+@]+)(?:@([^+@]+))?", text)
    if match is None:
        raise UsageError(
            f"--layout {text}", value=text, expected="BLOCK=GPA+SIZE, or BLOCK=GPA+SIZE@OFFSET"
        )
    name, gpa, size, offset = match.groups()
    start, length = parse_size(gpa), parse_size(size)
    if not length:
        raise UsageError(f"--layout {text}: it is empty", value=text, expected="a size above 0")
    return Block(
        name=name,
        start=start,
        end=start + length,
        offset=parse_size(offset or "0"),
        confidential=True,
    )


def _offsets(given: Sequence[str], files: Sequence[str]) -> list[int]:
    offsets = dict.fromkeys(files, 0)
    for text in given:
        name, equals, seconds = text.rpartition("=")
        if not equals or name not in offsets:
            raise UsageError(
                f"--offset {text}", value=text, expected="FILE=SECONDS, of a file that is given"
            )
        sign = -1 if seconds.startswith("-") else 1
        offsets[name] = sign * _nanoseconds(seconds.lstrip("+-"), "--offset")
    return list(offsets.values())
