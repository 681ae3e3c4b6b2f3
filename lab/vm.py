# SPDX-License-Identifier: Apache-2.0
"""
One run of the VM: boot, one command, power off.

Three things can come of it. The command ended: its exit code is the result, whatever happened to
the VM after. The VM ended without the command having done so, or took too long:
:class:`LostVmError`. And the kernel may have reported trouble of its own on the console: the result
has that as well.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lab import guest
from lab.console import KernelWatch, Lines
from lab.double import DOUBLE_VARIABLE, QEMU_VARIABLE
from lab.errors import LostVmError
from lab.recorders import PROGRAMS, RECORDERS_VARIABLE
from lab.shell import end_group
from lab.variants import Variant

__all__ = ["Machine", "Result", "Work"]

_MEMORY = "2G"
# A boot takes about five seconds on an idle machine; a busy one is not lost yet.
_BOOT_TIMEOUT_S = 180.0
# From the command's end to that of QEMU.
_POWER_OFF_TIMEOUT_S = 60.0
_POLL_S = 0.05
# Fit for any host: virtme-ng's own have no caching, and then each import of the guest asks the host
# for every file again. The guest's view is one of a moment, which is what a test run wants.
_ROOT_FLAGS = "rootflags=version=9p2000.L,trans=virtio,access=any,msize=512000,cache=loose"
_KERNEL_ARGUMENTS = (
    _ROOT_FLAGS,
    # A kernel that goes on after an oops may hang with a lock held.
    "oops=panic",
    # The check waits for a few ticks, and panics on a host that is too busy to deliver them
    # (arch/x86/kernel/apic/io_apic.c, check_timer()).
    "no_timer_check",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What to do in the VM."""

    command: str
    """Text for a shell, which runs it as root."""
    name: str
    """For the log's name; its beginning will do."""
    directory: Path
    """Where the command runs."""
    places: Sequence[Path] = ()
    """Folders of the host that the command needs, wherever they are."""
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float
    """Seconds for the command, from its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The command has ended."""

    status: int
    log: Path
    boot_seconds: float
    seconds: float
    """From its start to its end."""
    broken: Sequence[str]
    """Lines of the console by which the kernel is broken: the result does not count."""
    dubious: Sequence[str]
    """Lines of the console that deserve a look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A VM to be booted: a kernel, a QEMU, and the variant that says what machine it is."""

    kernel: Path
    qemu: Path
    launcher: Sequence[str]
    """The command that boots a kernel; ``virtme.run_command`` gives it."""
    variant: Variant
    logs: Path
    double: Path | None = None
    """The QEMU double, for programs in the VM that start confidential guests by *qemu*."""
    recorders: Path | None = None
    """Programs that record the kernel's events, for tests in the VM."""

    def command(self, exchange: Path) -> list[str]:
        """Return the command that boots the VM with *exchange* as the folder shared with it."""
        arguments = (*_KERNEL_ARGUMENTS, *self.variant.kernel_arguments)
        return [
            *self.launcher,
            *("--kimg", str(self.kernel), "--qemu-bin", str(self.qemu)),
            *("--mods", "none", "--force-9p", "--disable-kvm", "--disable-microvm"),
            *("--show-boot-console", "--verbose"),
            *("--memory", _MEMORY, "--cpus", str(self.variant.vcpus)),
            *(word for argument in arguments for word in ("--kopt", argument)),
            *("--script-sh", guest.bootstrap()),
            *("--qemu-opts", *self.variant.qemu_options, *guest.exchange_options(exchange)),
        ]

    def script(self, work: Work) -> str:
        """Return what the VM runs for *work*."""
        environment = {
            "RAMBLOCK_LAB": "1",
            "RAMBLOCK_LAB_VARIANT": self.variant.name,
            "RAMBLOCK_LAB_IOMMU": self.variant.iommu,
        }
        places = list(work.places)
        if self.double is not None:
            environment |= {QEMU_VARIABLE: str(self.qemu), DOUBLE_VARIABLE: str(self.double)}
            places += [self.qemu.parent, self.double]
        if self.recorders is not None:
            environment[RECORDERS_VARIABLE] = str(self.recorders / PROGRAMS)
            places.append(self.recorders)
        return guest.script(
            work.command,
            processors=self.variant.command_processors,
            directory=work.directory,
            places=places,
            environment={**environment, **work.environment},
        )

    def run(
        self,
        work: Work,
        *,
        show: Callable[[str], object] | None = None,
        collect: Callable[[Path], object] | None = None,
    ) -> Result:
        """
        Boot, run the command, power off.

        :param show: Gets each line of the command's output, as it comes.
        :param collect: Gets the folder between host and guest once the VM is gone, while the folder
            is still there; also when the VM was lost.
        :raises LostVmError: Nothing is known of the command's result. The VM is gone.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        log = (
            self.logs / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}-{self.variant.name}"
            f"-{_as_name(work.name)}.log"
        )
        exchange = Path(tempfile.mkdtemp(prefix="ramblock-lab-"))
        try:
            (exchange / "script").write_text(self.script(work))
            (exchange / "status").touch()
            (exchange / "output").touch()
            run = _Run(self.command(exchange), work, exchange, log, show)
            try:
                return run.result()
            finally:
                if collect is not None:
                    collect(exchange)
        finally:
            shutil.rmtree(exchange)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text[:40]).strip("-") or "run"


class _Run:
    # One VM from its start to its end.
    def __init__(
        self,
        command: Sequence[str],
        work: Work,
        exchange: Path,
        log: Path,
        show: Callable[[str], object] | None,
    ) -> None:
        self._work = work
        self._log = log
        self._command = command
        self._show = show
        self._exchange = exchange
        self._watch = KernelWatch()
        self._started = time.monotonic()
        self._running: float | None = None
        self._ended: float | None = None

    def result(self) -> Result:
        with (
            self._log.open("wb", buffering=0) as log,
            (self._exchange / "output").open("rb") as output,
        ):
            log.write(self._heading().encode())
            # Two streams into one log, each by whole lines.
            self._console = Lines(log, self._watch.line)
            self._output = Lines(log, self._show)
            process = subprocess.Popen(
                self._command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                # A pipe: QEMU opens it anew for each of its outputs, and those would write over
                # each other in a file.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which ends as one
            )
            assert process.stdout is not None
            with process.stdout as console:
                os.set_blocking(console.fileno(), False)
                try:
                    lost = self._follow(process, console, output)
                finally:
                    end_group(process)
                    self._read(console, output)
                    self._console.end()
                    self._output.end()
            self._note_times()
            status = guest.exit_status(self._status())
            if status is None:
                reason = lost or self._reason()
                log.write(f"# lost: {reason}\n".encode())
                raise LostVmError(reason, self._log)
            if lost is not None:  # it hangs in its own shutdown, with what the command has left
                self._watch.broken.append(lost)
            log.write(f"# exit code {status}\n".encode())
        assert self._running is not None
        assert self._ended is not None
        return Result(
            status=status,
            log=self._log,
            boot_seconds=self._running - self._started,
            seconds=self._ended - self._running,
            broken=tuple(self._watch.broken),
            dubious=tuple(self._watch.dubious),
        )

    def _follow(
        self, process: subprocess.Popen[bytes], console: IO[bytes], output: IO[bytes]
    ) -> str | None:
        # Until QEMU is gone, or too late: then why.
        with selectors.DefaultSelector() as selector:
            selector.register(console, selectors.EVENT_READ)
            while process.poll() is None:
                selector.select(timeout=_POLL_S)
                self._read(console, output)
                self._note_times()
                if (late := self._too_late()) is not None:
                    return late
        return None

    def _read(self, console: IO[bytes], output: IO[bytes]) -> None:
        self._console.feed(console.read() or b"")  # None: nothing yet
        self._output.feed(output.read())

    def _note_times(self) -> None:
        status = self._status()
        if self._running is None and guest.started(status):
            self._running = time.monotonic()
        if self._ended is None and guest.exit_status(status) is not None:
            self._ended = time.monotonic()

    def _too_late(self) -> str | None:
        now = time.monotonic()
        if self._running is None:
            over = now - self._started > _BOOT_TIMEOUT_S
            return f"it did not boot in {_BOOT_TIMEOUT_S:.0f} s" if over else None
        if self._ended is None:
            over = now - self._running > self._work.timeout
            return f"the command was not done after {self._work.timeout:.0f} s" if over else None
        return "it did not power off" if now - self._ended > _POWER_OFF_TIMEOUT_S else None

    def _reason(self) -> str:
        when = "while it booted" if self._running is None else "while the command ran"
        if self._watch.broken:
            return f"{self._watch.broken[0]} ({when})"
        return f"QEMU ended {when}; the last line of its console: {self._watch.last}"

    def _status(self) -> str:
        return (self._exchange / "status").read_text(errors="replace")

    def _heading(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        return f"# {when}\n# {self._work.command}\n# {shlex.join(self._command)}\n"
