# SPDX-License-Identifier: Apache-2.0
"""
A pytest plugin that shows which memory a VMM lets its devices reach.

In ``conftest.py``::

    pytest_plugins = ["ramblock.testing.plugin"]

In a test::

    def test_windows(ramblock_probe):
        probe = ramblock_probe()
        probe.run_vmm("my-vmm", "--memory", "512M", "--vfio-user", probe.path)
        probe.settle()
        probe.assert_mapped(0, 512 << 20)
        probe.assert_not_mapped(1 << 32, 1 << 30)

When the test ends the VMM is ended too, and a rule that it broke, or a window that it left behind,
is an error of the test.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import pytest

from ramblock.errors import describe_range
from ramblock.probe import Probe, UnmapRule, Window
from ramblock.trace import TraceWriter
from ramblock.units import format_size

__all__ = ["ProbeFactory", "Vmm", "VmmEndedError", "VmmProbe", "ramblock_probe"]

_END = 1 << 64
# For a VMM that is to end to do so by itself.
_GRACE_SECONDS = 10.0
_SHOWN = 8
_TAIL_LINES = 40


class VmmEndedError(AssertionError):
    """A VMM ended while something was expected of it."""


class Vmm:
    """
    A VMM that runs.

    :ivar process: Its process, which leads a group of its own.
    :ivar output_path: What it writes to stdout and stderr.
    """

    def __init__(self, command: list[str], output_path: Path, **options: Any) -> None:
        self.output_path = output_path
        self._command = command
        self._stopped = False
        with output_path.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def __str__(self) -> str:
        return shlex.join(self._command)

    def output(self) -> str:
        """Return what it has written so far."""
        return self.output_path.read_text(errors="replace")

    def check_runs(self) -> None:
        """
        Make sure that it runs, or was stopped.

        :raises VmmEndedError: It has ended by itself.
        """
        if self.process.poll() is not None and not self._stopped:
            raise VmmEndedError(
                f"{self._command[0]} has ended with exit code {self.process.returncode}:\n"
                f"{self._tail()}"
            )

    def stop(self) -> int:
        """End it and all that it started; return its exit code. Nothing happens the second time."""
        if self._stopped:
            return self.process.wait()
        self._stopped = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def _tail(self) -> str:
        return "\n".join(self.output().splitlines()[-_TAIL_LINES:])


class VmmProbe(Probe):
    """
    A probe with what a test wants of it. Made by the fixture :func:`ramblock_probe`.

    Addresses are those of the device, in bytes; without an IOMMU in the guest they are the guest's.

    :param folder: For the socket, and the output of VMMs.
    :param trace: Where to write the events; whole once the probe has stopped.
    :param options: Those of :class:`~ramblock.probe.Probe`.
    """

    def __init__(self, folder: Path, trace: Path | None, **options: Any) -> None:
        self._writer = TraceWriter(trace)
        super().__init__(folder / "probe.sock", trace=(self._writer,), **options)
        self._folder = folder
        #: The VMMs that were started, the first one first.
        self.vmms: list[Vmm] = []

    def run_vmm(self, *command: str | os.PathLike[str], **options: Any) -> Vmm:
        """
        Start a VMM; it is ended with the test at the latest.

        :param command: With :attr:`path` somewhere in it.
        :param options: For :class:`subprocess.Popen`.
        """
        output = self._folder / f"vmm{len(self.vmms) + 1}.log"
        vmm = Vmm([os.fspath(word) for word in command], output, **options)
        self.vmms.append(vmm)
        return vmm

    def stop(self) -> None:
        """End the VMMs, stop, and close the trace. Nothing happens the second time."""
        for vmm in reversed(self.vmms):
            vmm.stop()
        super().stop()
        self._writer.close()

    def wait_for(self, condition: Callable[[], object], timeout: float = 30.0) -> None:
        """
        Wait until *condition* holds, as long as the VMMs run.

        :raises VmmEndedError: One of them has ended before that.
        :raises TimeoutError: It does not hold within *timeout* seconds.
        """

        def holds() -> object:
            result = condition()
            if not result:
                for vmm in self.vmms:
                    vmm.check_runs()
            return result

        super().wait_for(holds, timeout)

    def settle(self, quiet: float = 0.5, timeout: float = 30.0) -> None:
        """
        Wait until a client is there and has left its windows alone for *quiet* seconds.

        One window at least has to be there.

        :raises TimeoutError: It does not within *timeout* seconds.
        """
        last: tuple[object, ...] = ()
        since = monotonic()

        def is_quiet() -> bool:
            nonlocal last, since
            counts = self.record.counts
            now = (self.client, counts["map"], counts["unmap"], self.record.violation_count)
            if now != last:
                last, since = now, monotonic()
            return bool(self.windows) and monotonic() - since >= quiet

        self.wait_for(is_quiet, timeout)

    def total(self, address: int = 0, size: int = _END) -> int:
        """Return how many bytes of a range are mapped."""
        return sum(end - start for start, end in _parts(self.windows, address, size))

    def assert_mapped(self, address: int, size: int) -> None:
        """
        Make sure that the device reaches all of a range.

        :raises AssertionError: It does not; the text says which parts are missing.
        """
        missing, position = [], address
        for start, end in [*_parts(self.windows, address, size), (address + size, 0)]:
            if start > position:
                missing.append((position, start))
            position = end
        if missing:
            raise AssertionError(
                f"of {describe_range(address, size)} not all is mapped; missing: {_listed(missing)}"
            )

    def assert_not_mapped(self, address: int, size: int) -> None:
        """
        Make sure that the device reaches nothing of a range.

        :raises AssertionError: It does; the text says where.
        """
        found = list(_parts(self.windows, address, size))
        if found:
            raise AssertionError(
                f"of {describe_range(address, size)} something is mapped: {_listed(found)}"
            )

    def assert_clean(self) -> None:
        """
        Make sure that no rule was broken and no window left behind, up to now.

        :raises AssertionError: Something was found; the text says what.
        """
        if self.record.clean:
            return
        lines = [
            f"{stale.client}: stale {describe_range(stale.address, stale.size)}"
            for stale in self.record.stale
        ]
        lines = _first([*map(str, self.record.violations), *lines])
        count = self.record.violation_count
        raise AssertionError(
            f"found {count} broken rules and {self.record.stale_count} stale windows:\n"
            + "\n".join(lines)
        )


class ProbeFactory(Protocol):
    """What the fixture gives."""

    def __call__(
        self,
        *,
        unmap: UnmapRule | str = UnmapRule.LENIENT,
        touch: bool = True,
        scribble: bool = False,
        trace: Path | None = None,
        clean: bool = True,
    ) -> VmmProbe:
        """
        Start a probe on a socket of its own.

        :param unmap: What an unmap has to name, ``"lenient"`` or ``"exact"``.
        :param touch: Read random pages of the windows all the time.
        :param scribble: Write to them as well. The guest's data is lost.
        :param trace: Where to write the events.
        :param clean: Whether what it found is an error at the end of the test.
        """


@pytest.fixture
def ramblock_probe() -> Iterator[ProbeFactory]:
    """
    Give a function that starts probes; see :class:`ProbeFactory`.

    All of them, and their VMMs, end with the test.
    """
    with ExitStack() as stack:
        # Not pytest's folder: the path of a socket may have no more than 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramblock-")))
        count = 0

        def start(
            *,
            unmap: UnmapRule | str = UnmapRule.LENIENT,
            touch: bool = True,
            scribble: bool = False,
            trace: Path | None = None,
            clean: bool = True,
        ) -> VmmProbe:
            nonlocal count
            count += 1
            own = folder / str(count)
            own.mkdir()
            probe = VmmProbe(
                own,
                trace,
                unmap=UnmapRule(unmap),
                touch=touch,
                scribble=scribble,
            )
            # In the order in which they are undone, from the last one.
            if clean:
                stack.callback(probe.assert_clean)
            stack.callback(_show_output, probe)
            stack.enter_context(probe)
            return probe

        yield start


def _show_output(probe: VmmProbe) -> None:
    """Print it; pytest shows that where a test has failed."""
    for vmm in probe.vmms:
        print(f"--- output of {vmm}\n{vmm.output()}")  # noqa: T201


def _parts(windows: list[Window], address: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut what is mapped to a range; as (start, end), ascending."""
    for window in windows:
        start, end = max(window.address, address), min(window.end, address + size)
        if start < end:
            yield start, end


def _listed(ranges: list[tuple[int, int]]) -> str:
    total = sum(end - start for start, end in ranges)
    parts = _first([describe_range(start, end - start) for start, end in ranges])
    return f"{', '.join(parts)} ({format_size(total)})"


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"and {more} more"]
