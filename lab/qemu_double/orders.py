# SPDX-License-Identifier: Apache-2.0
"""Orders to the guest's firmware, and its answers: the other side of ``firmware.S``."""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

__all__ = ["READY", "Firmware", "Order"]

READY = b"W_ready\n"
"""What the firmware writes when it has started, and again after each reset."""

_ANSWER = struct.Struct("<Q")
_MASK = (1 << 64) - 1
# How often, while there is no answer, somebody looks whether there can still be one.
_POLL_SECONDS = 0.1
_HISTORY = 6


class Order(Enum):
    """What the firmware can do; the arguments and answers are in the table of ``firmware.S``."""

    PING = b"p"
    VMMCALL = b"c"
    DOORBELL = b"d"
    PORT_IN = b"i"
    PORT_OUT = b"o"
    READ = b"r"
    WRITE = b"w"
    FILL_PAGES = b"f"
    COUNT_FILLED = b"s"
    COUNT_ZERO = b"z"


class Firmware:
    """
    Sends orders, one after the other.

    :param line: COM1, connected; closed by :meth:`close`.
    :param check: Called again and again while there is no answer; raises if there will be none.
    :ivar history: The newest orders, with their answers, oldest first.
    """

    def __init__(self, line: socket.socket, check: Callable[[], None]) -> None:
        self._line = line
        self._check = check
        self.history: deque[str] = deque(maxlen=_HISTORY)
        line.settimeout(_POLL_SECONDS)

    def wait_ready(self, timeout: float) -> None:
        """
        Wait until the firmware has started.

        :raises TimeoutError: It has not within *timeout* seconds.
        :raises ValueError: It wrote something else.
        """
        if (text := self._receive(timeout)) != READY:
            raise ValueError(f"the firmware starts with {text!r}, expected {READY!r}")

    def ask(
        self, order: Order, a: int = 0, b: int = 0, c: int = 0, d: int = 0, *, timeout: float = 60.0
    ) -> int:
        """
        Give an order; return its answer, unsigned.

        :raises TimeoutError: There is none within *timeout* seconds. It may still come, so nothing
            more can be asked.
        """
        text = f"{order.name} {a:#x} {b:#x} {c:#x} {d:#x}"
        self.history.append(text)
        try:
            self._line.sendall(order.value + b"".join(map(_number, (a, b, c, d))))
            data = self._receive(timeout)
        except ConnectionError:
            self._check()  # it knows why nobody is there
            raise
        answer: int = _ANSWER.unpack(data)[0]
        self.history[-1] = f"{text} -> {answer:#x}"
        return answer

    def _receive(self, timeout: float) -> bytes:
        data = b""
        deadline = time.monotonic() + timeout
        while len(data) < _ANSWER.size:
            try:
                part = self._line.recv(_ANSWER.size - len(data))
            except TimeoutError:
                self._check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"the firmware has not answered within {timeout:g} s"
                    ) from None
                continue
            if not part:
                self._check()
                raise ConnectionError("COM1 was closed")
            data += part
        return data

    def close(self) -> None:
        """Close COM1."""
        self._line.close()


def _number(value: int) -> bytes:
    value &= _MASK
    size = (value.bit_length() + 7) // 8
    return bytes([size]) + value.to_bytes(size, "little")
