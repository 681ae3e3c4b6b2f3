# SPDX-License-Identifier: Apache-2.0
"""Programs that the lab runs while it builds: output goes to a log, one line per step is shown."""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.errors import CommandError
from lab.progress import Progress

__all__ = ["Shell", "end_group"]

# Of a failed program's output; the rest is in its log.
_TAIL_LINES = 15
# For a program that is to end to put away what it is writing.
_GRACE_S = 5
_OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")


class Shell:
    """
    Runs programs, or prints what it would run.

    :param logs: Folder of the logs.
    :param keep_open: File descriptors that each program inherits (``Cache.lock`` says why).
    """

    def __init__(self, logs: Path, *, dry_run: bool = False, keep_open: Sequence[int] = ()) -> None:
        self.dry_run = dry_run
        self._logs = logs
        self._keep_open = tuple(keep_open)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        what: str,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        describe: Callable[[bytes], str] | None = None,
    ) -> None:
        """
        Run *command* to its end, with its output in ``logs/WHAT.log``.

        :param what: The step, for people; the log's name as well.
        :param environment: Added to our own.
        :param describe: Gets each line of output and says how far the step is.
        :raises CommandError: It failed. Whatever it had done by then is still there.
        """
        words = [str(word) for word in command]
        if self.dry_run:
            place = f"cd {shlex.quote(str(cwd))} && " if cwd else ""
            settings = "".join(f"{k}={shlex.quote(v)} " for k, v in (environment or {}).items())
            print(f"{place}{settings}{shlex.join(words)}")
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"build-{what.replace(' ', '-')}.log"
        progress = Progress(what)
        with log.open("wb") as sink:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=_environment() | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which ends as one
                pass_fds=self._keep_open,
            )
            try:
                assert process.stdout is not None
                os.set_blocking(process.stdout.fileno(), False)
                _follow(process, sink.write, progress, describe)
            except BaseException:
                end_group(process)
                progress.end("interrupted")
                raise
            finally:
                assert process.stdout is not None
                process.stdout.close()
        if process.returncode:
            progress.end("failed")
            lines = log.read_text(errors="replace").splitlines()
            raise CommandError(what, process.returncode, "\n".join(lines[-_TAIL_LINES:]), log)
        progress.end("done")

    def ask(self, command: Sequence[str | Path]) -> str:
        """
        Return what *command* prints. It changes nothing, so it is run in a dry run too.

        :raises CommandError: It failed.
        """
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(shlex.join(words), done.returncode, done.stderr.strip(), None)
        return done.stdout


def _environment() -> dict[str, str]:
    # `make lab` would hand down its own options and variables, and a jobserver that is not there,
    # to the kernel's make.
    return {name: value for name, value in os.environ.items() if name not in _OF_MAKE}


def _follow(
    process: subprocess.Popen[bytes],
    write: Callable[[bytes], object],
    progress: Progress,
    describe: Callable[[bytes], str] | None,
) -> None:
    assert process.stdout is not None
    detail, partial = "", b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            progress.update(detail)
            if not selector.select(timeout=1):
                continue
            data = process.stdout.read()
            if data == b"":  # None: nothing yet
                break
            write(data or b"")
            *lines, partial = (partial + (data or b"")).split(b"\n")
            if describe is not None:
                for line in lines:
                    detail = describe(line)
    process.wait()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """
    End *process*, which leads a group of its own, and all that it started.

    Return when it is gone.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
        # Whatever did not listen, the leader itself perhaps.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
