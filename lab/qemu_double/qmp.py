# SPDX-License-Identifier: Apache-2.0
"""
QEMU's monitor protocol, as much as the double needs.

One command at a time; events are kept until somebody wants them. QEMU's own Python package speaks
it too, but with asyncio, and the lab's scripts have to run without other packages.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

__all__ = ["Qmp", "QmpError"]


class QmpError(Exception):
    """
    QEMU refused a command.

    :ivar command: Its name.
    :ivar description: QEMU's reason.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.description = description


class Qmp:
    """
    One monitor.

    :param line: Connected to it; closed by :meth:`close`.
    """

    def __init__(self, line: socket.socket, timeout: float = 60.0) -> None:
        self._line = line
        self._timeout = timeout
        self._partial = b""
        self._events: list[dict[str, Any]] = []
        self._next(time.monotonic() + timeout)  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """
        Carry out a command; return its answer.

        :raises QmpError: QEMU refused it.
        :raises ConnectionError: QEMU is gone.
        :raises TimeoutError: It does not answer.
        """
        request = {"execute": command, "arguments": arguments}
        self._line.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._next(deadline)
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpError(command, message["error"]["desc"])
            else:
                return message["return"]

    def human(self, line: str) -> str:
        """Carry out a line of the human monitor; return what it prints."""
        text: str = self.execute("human-monitor-command", **{"command-line": line})
        return text.replace("\r\n", "\n")

    def wait_event(self, name: str, timeout: float = 60.0) -> dict[str, Any]:
        """
        Return the oldest event of that name that nobody has taken; wait for it.

        :raises TimeoutError: There is none within *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for event in self._events:
                if event["event"] == name:
                    self._events.remove(event)
                    return event
            self._events.append(self._next(deadline))

    def remaining_events(self, timeout: float = 1.0) -> list[dict[str, Any]]:
        """
        Return the events that nobody has taken, with those still to come from a QEMU that ends.

        Nothing is raised: what can be read is read, until the monitor is closed or *timeout*.
        """
        deadline = time.monotonic() + timeout
        with suppress(OSError, ValueError):
            while True:
                message = self._next(deadline)
                if "event" in message:
                    self._events.append(message)
        events, self._events = self._events, []
        return events

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._partial:
            self._line.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._line.recv(1 << 16)
            except TimeoutError:
                raise TimeoutError("QEMU's monitor says nothing") from None
            if not data:
                raise ConnectionError("QEMU closed its monitor")
            self._partial += data
        line, self._partial = self._partial.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close the connection."""
        self._line.close()
