# SPDX-License-Identifier: Apache-2.0
"""
A VMM's own account of its memory, held against its device's windows.

QEMU tells over QMP how much of each virtio-mem device is plugged (query-memory-devices;
qapi/machine.json). With a coordinated VMM the windows inside the device's region have as many
bytes, once a change has settled.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ramblock.errors import UsageError
from ramblock.probe.record import Violation
from ramblock.probe.windows import Rule
from ramblock.units import format_size

if TYPE_CHECKING:
    from ramblock.probe.server import Probe

__all__ = ["Plugged", "VirtioMemExpectation"]

_EVERY_SECONDS = 0.5
_LOOK_SECONDS = 0.1
# Plugging goes block by block, and QEMU tells the size before its listeners are done.
_SETTLED_SECONDS = 3.0


@dataclass(frozen=True)
class Plugged:
    """One virtio-mem device at one moment."""

    name: str
    gpa: int
    """Where its region begins."""
    max_size: int
    """Bytes of its region."""
    plugged: int
    """Bytes that QEMU says are plugged."""
    mapped: int
    """Bytes of windows in its region."""

    @property
    def agrees(self) -> bool:
        """Whether both are the same."""
        return self.plugged == self.mapped


class VirtioMemExpectation:
    """
    Asks QEMU all the time, on a thread of its own; a difference that lasts is a violation.

    :param probe: Whose windows are compared.
    :param path: QEMU's QMP socket; it may come later, go, and come again.
    :raises UsageError: The package qemu.qmp is not installed.
    """

    def __init__(self, probe: Probe, path: Path) -> None:
        try:
            from qemu.qmp import QMPClient
        except ImportError:
            raise UsageError(
                "--expect needs the package qemu.qmp", expected="pip install 'ramblock[probe]'"
            ) from None
        self._make_client: Callable[[], Any] = lambda: QMPClient("ramblock probe")
        self._probe = probe
        self._path = path
        #: The latest answer, by the device's name.
        self.devices: dict[str, Plugged] = {}
        #: How many answers were compared.
        self.comparisons = 0
        self._differs_since: dict[str, tuple[Plugged, float]] = {}
        self._told: dict[str, Plugged] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qmp", daemon=True)

    def start(self) -> None:
        """Start to ask."""
        self._thread.start()

    def stop(self) -> None:
        """
        Stop, and wait for the thread.

        QEMU may owe it an answer for ever (its one monitor is taken).
        """
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._watch_until_stopped())

    async def _watch_until_stopped(self) -> None:
        watch = asyncio.create_task(self._watch())
        while not self._stopping.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch

    async def _watch(self) -> None:
        while not self._stopping.is_set():
            client = self._make_client()
            # It logs an error that is none here: that QEMU has not come yet.
            client.logger.setLevel(logging.CRITICAL)
            try:
                await client.connect(str(self._path))
            except Exception:  # with any of them, QEMU is not there yet, or not any more
                await asyncio.sleep(_EVERY_SECONDS)
                continue
            try:
                await self._ask(client.execute)
            except Exception:  # QEMU has gone in the middle of an answer
                continue
            finally:
                with suppress(Exception):
                    await client.disconnect()

    async def _ask(self, execute: Callable[[str], Awaitable[Any]]) -> None:
        while not self._stopping.is_set():
            for entry in await execute("query-memory-devices"):
                if entry["type"] == "virtio-mem":
                    self._compare(entry["data"])
            self.comparisons += 1
            await asyncio.sleep(_EVERY_SECONDS)

    def _compare(self, data: dict[str, Any]) -> None:
        gpa, max_size = data["memaddr"], data["max-size"]
        name = data.get("id") or f"virtio-mem at {gpa:#x}"
        mapped = sum(
            max(0, min(window.end, gpa + max_size) - max(window.address, gpa))
            for window in self._probe.windows
        )
        now = Plugged(name, gpa, max_size, data["size"], mapped)
        if now != self.devices.get(name):
            self._probe.record.emit(
                "plugged",
                device=name,
                gpa=gpa,
                max_size=max_size,
                plugged=now.plugged,
                mapped=mapped,
            )
        self.devices[name] = now
        self._judge(now)

    def _judge(self, now: Plugged) -> None:
        """Let a difference settle, and tell it once."""
        if now.agrees or self._probe.client is None:
            self._differs_since.pop(now.name, None)
            self._told.pop(now.name, None)
            return
        before, since = self._differs_since.get(now.name, (None, 0.0))
        if before != now:
            self._differs_since[now.name] = now, monotonic()
        elif monotonic() - since > _SETTLED_SECONDS and self._told.get(now.name) != now:
            self._told[now.name] = now
            self._probe.record.violation(
                Violation(
                    self._probe.client,
                    Rule.EXPECTATION,
                    now.gpa,
                    now.max_size,
                    None,
                    f"of {now.name} {format_size(now.plugged)} are plugged,"
                    f" and windows have {format_size(now.mapped)}",
                )
            )
