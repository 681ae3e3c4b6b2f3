# SPDX-License-Identifier: Apache-2.0
"""``python -m lab``: the commands, their exit codes, and the messages of errors."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab import build, busybox, double, emulator, kernel, recorders, suite, virtme
from lab.build import Lab
from lab.cache import Cache
from lab.errors import EXIT_LAB, LabError
from lab.variants import VARIANTS
from lab.vm import Machine, Work

__all__ = ["main", "make_parser"]

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # as a shell has it for SIGINT and SIGPIPE

_EPILOG = f"""\
exit codes: boot: that of the command; test: 0 all passed, 1 some failed or none ran; {EXIT_LAB} the
lab itself failed (it could not be built, or the VM was lost), which `git bisect run` skips;
2 usage; {EXIT_INTERRUPTED} interrupted
"""


def make_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description="A virtual machine in which KVM, IOMMU and VFIO are real,"
        " on any x86-64 machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    building = commands.add_parser("build", help="build what is not in the cache yet")
    building.set_defaults(start=_build)
    booting = commands.add_parser(
        "boot",
        help="run one command in the VM",
        description="Run COMMAND as root in the VM: one argument is text for a shell,"
        " several are the words of a command. "
        "The VM sees the host's files, and cannot change them; its /tmp is its own.",
    )
    booting.set_defaults(start=_boot)
    booting.add_argument(
        "--variant",
        choices=VARIANTS,
        default="intel-iommu",
        help="the machine (default: %(default)s)",
    )
    testing = commands.add_parser(
        "test",
        allow_abbrev=False,  # what is not ours is pytest's
        help="run the tests of tests/lab; other arguments go to pytest",
        usage="%(prog)s [-h] [--variant NAME]... [--kernel PATH] [--qemu PATH] [--timeout SECONDS]"
        " [--dry-run] [PYTEST ARGUMENT]...",
    )
    testing.set_defaults(start=_test)
    testing.add_argument(
        "--variant",
        action="append",
        choices=(suite.HOST, *VARIANTS),
        metavar="NAME",
        help=f"only this one; may be given several times: {suite.HOST} (the tests that need no VM),"
        f" {', '.join(VARIANTS)}",
    )
    doubling = commands.add_parser(
        "qemu",
        help="run a script with QEMU's confidential guests, without confidential hardware",
        description="Run SCRIPT, a Python program that starts guests by lab.qemu_double, with this "
        "Python. lab/qemu_double/scripts has some; docs/qemu-without-snp.rst explains them.",
        epilog="exit codes: that of the script, or those of the lab",
    )
    doubling.set_defaults(start=_qemu)
    doubling.add_argument(
        "--real",
        action="store_true",
        help="in the VM, where private memory and the IOMMU are the kernel's; "
        "without it on this machine, with any /dev/kvm and a vfio-user device",
    )
    doubling.add_argument(
        "--variant",
        choices=VARIANTS,
        default="amd-iommu",
        help="the machine for --real (default: %(default)s)",
    )
    doubling.add_argument("words", nargs="+", metavar="SCRIPT", help="and its arguments")
    for command in (building, booting, testing, doubling):
        command.add_argument("--dry-run", action="store_true", help="print what would be run")
    for command in (booting, testing, doubling):
        own = command.add_argument_group("your own")
        own.add_argument(
            "--kernel",
            type=_file,
            metavar="PATH",
            help="a bzImage with the options of lab/kernel.config",
        )
        own.add_argument(
            "--qemu", type=_file, metavar="PATH", help="a qemu-system-x86_64, 10.2 or newer"
        )
        command.add_argument(
            "--timeout",
            type=float,
            default=1800.0,
            metavar="SECONDS",
            help="how long the command may take in one VM (default: %(default).0f)",
        )
    booting.add_argument("words", nargs="+", metavar="COMMAND")

    listing = commands.add_parser("list", help="show the variants and what is in the cache")
    listing.set_defaults(start=_list)
    cleaning = commands.add_parser(
        "clean", help="remove logs, interrupted builds and what the current lab does not use"
    )
    cleaning.set_defaults(start=_clean)
    cleaning.add_argument("--all", action="store_true", help="remove the current lab too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        code: int = arguments.start(arguments)
        return code
    except LabError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return EXIT_LAB
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `... | head`: whoever read has enough. Nothing more is to be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _file(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


def _build(arguments: argparse.Namespace) -> int:
    cache = Cache()
    started = time.monotonic()
    lab = build.provide(cache, dry_run=arguments.dry_run)
    if not arguments.dry_run:
        print(f"lab: ready in {time.monotonic() - started:.1f} s: {lab.kernel}, {lab.qemu}")
    return 0


def _boot(arguments: argparse.Namespace) -> int:
    words = arguments.words
    command = words[0] if len(words) == 1 else shlex.join(words)
    work = Work(
        command=command,
        name=command,
        directory=Path.cwd(),
        places=suite.places(),
        environment=suite.environment(),
        timeout=arguments.timeout,
    )
    machine = _machine(_provided(arguments), arguments.variant)
    if arguments.dry_run:
        _print_run(machine, work)
        return 0
    result = machine.run(work, show=print)
    for line in (*result.broken, *result.dubious):
        print(f"lab: kernel: {line}", file=sys.stderr)
    if result.status:
        print(f"lab: exit code {result.status}; log: {result.log}", file=sys.stderr)
    # A kernel that is broken leaves no result that counts.
    return EXIT_LAB if result.broken else result.status


def _test(arguments: argparse.Namespace) -> int:
    if lacking := [name for name in ("pytest", "ramblock") if not importlib.util.find_spec(name)]:
        raise LabError(f"{sys.executable} has no {' and no '.join(lacking)}; run: make lab-test")
    lab = _provided(arguments)
    outcomes = []
    # With a kernel of somebody's own there are no headers of it.
    host = [suite.HOST] if lab.headers else []
    for part in suite.parts(arguments.variant or [*host, *VARIANTS], arguments.rest):
        machine = None if part.name == suite.HOST else _machine(lab, part.name)
        if arguments.dry_run:
            if machine is None:
                print(shlex.join(suite.host_command(part)))
            else:
                _print_run(machine, suite.work_for(part, arguments.timeout))
            continue
        print(f"lab: {part.name}", flush=True)
        if machine is None:
            outcomes.append(suite.run_host(lab, part))
        else:
            outcomes.append(suite.run_variant(machine, part, timeout=arguments.timeout))
    if arguments.dry_run:
        return 0
    print(suite.summary(outcomes))
    return suite.exit_code(outcomes)


def _qemu(arguments: argparse.Namespace) -> int:
    if not importlib.util.find_spec("ramblock"):
        raise LabError(
            f"{sys.executable} has no ramblock; run: make .venv/.test, then"
            " .venv/bin/python -m lab qemu"
        )
    script = Path(arguments.words[0]).absolute()
    if not script.is_file():
        raise LabError(f"no such script: {arguments.words[0]}")
    # It is started by its path, so this repository is not on its path by itself.
    command = ["env", f"PYTHONPATH={suite.REPOSITORY}", sys.executable, str(script)]
    command += arguments.words[1:]
    if arguments.real:
        arguments.words = command
        return _boot(arguments)
    if arguments.kernel is not None:
        raise LabError("--kernel is for --real: without it no kernel is booted")
    cache = Cache()
    build.provide_double(cache, own_qemu=arguments.qemu, dry_run=arguments.dry_run)
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    environment = dict(os.environ)
    if arguments.qemu is not None:
        environment[double.QEMU_VARIABLE] = str(arguments.qemu)
    return subprocess.run(command, env=environment, check=False).returncode


def _list(arguments: argparse.Namespace) -> int:
    for variant in VARIANTS.values():
        print(f"{variant.name:<12} {variant.about}")
    cache = Cache()
    current = {name: find(cache) for name, find in FINDERS.items()}
    print()
    for kind in FINDERS:
        for entry in cache.entries(kind):
            mark = "*" if entry == current[kind] else " "
            facts = " ".join(
                v for k, v in entry.inputs.items() if k in ("package", "version", "virtme-ng")
            )
            print(f"{mark} {kind:<7} {entry.path}  {facts}")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    cache = Cache()
    with cache.lock():
        current = (
            set()
            if arguments.all
            else {entry.path for find in FINDERS.values() if (entry := find(cache))}
        )
        for kind in FINDERS:
            for path in (cache.root / kind).glob("*"):
                if path not in current:
                    cache.remove(path)
        for path in (cache.root / "work", cache.logs):
            shutil.rmtree(path, ignore_errors=True)
    return 0


FINDERS = {
    "kernel": kernel.find,
    "qemu": emulator.find,
    "busybox": busybox.find,
    "recorders": recorders.find,
    "double": double.find,
    "virtme": virtme.find,
}


def _provided(arguments: argparse.Namespace) -> Lab:
    return build.provide(
        Cache(), own_kernel=arguments.kernel, own_qemu=arguments.qemu, dry_run=arguments.dry_run
    )


def _machine(lab: Lab, variant: str) -> Machine:
    return Machine(
        kernel=lab.kernel,
        qemu=lab.qemu,
        double=lab.double,
        recorders=lab.recorders,
        launcher=lab.launcher,
        variant=VARIANTS[variant],
        logs=Cache().logs,
    )


def _print_run(machine: Machine, work: Work) -> None:
    print(shlex.join(machine.command(Path("EXCHANGE"))))
    print(f"# EXCHANGE/script:\n{machine.script(work)}", end="")
