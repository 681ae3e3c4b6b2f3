# SPDX-License-Identifier: Apache-2.0
"""The registers in BAR 0 (:mod:`ramblock.vfio.probe_registers`), and the engine behind them."""

from __future__ import annotations

import errno
import struct
from typing import Protocol

from ramblock.vfio.probe_registers import BAR_SIZE, DATA, DATA_SIZE, MAGIC, Command, Register

__all__ = ["DmaEngine", "DmaRefusedError", "ReachesMemory"]

_VERSION = 1


class DmaRefusedError(Exception):
    """
    The device did not get at the memory.

    :ivar errno: EFAULT: not mapped. EIO: mapped, and the memory did not answer.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.errno = number


class ReachesMemory(Protocol):
    """The device's way to memory."""

    def read(self, address: int, size: int) -> bytes:
        """
        Read as the device.

        :raises DmaRefusedError: It did not get there.
        """

    def write(self, address: int, data: bytes) -> None:
        """Write as the device; raises as :meth:`read`."""


class DmaEngine:
    """
    BAR 0.

    :param memory: Its access to the client's memory.
    """

    def __init__(self, memory: ReachesMemory) -> None:
        self._memory = memory
        self._bytes = bytearray(BAR_SIZE)
        self.reset()

    def reset(self) -> None:
        """Put all registers back to their first values."""
        self._bytes[:] = bytes(BAR_SIZE)
        struct.pack_into("<II", self._bytes, Register.MAGIC, MAGIC, _VERSION)

    def read(self, offset: int, size: int) -> bytes:
        """Read ``[offset, offset + size)``, which lies inside."""
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write; a write that reaches the end of the command register runs the command."""
        end = offset + len(data)
        for start, stop in ((Register.ADDRESS, Register.RESULT), (DATA, DATA + DATA_SIZE)):
            low, high = max(offset, start), min(end, stop)
            if low < high:
                self._bytes[low:high] = data[low - offset : high - offset]
        if offset < Register.COMMAND + 4 <= end:
            self._set(Register.RESULT, self._run())

    def _run(self) -> int:
        address, length, command = struct.unpack_from("<QII", self._bytes, Register.ADDRESS)
        if not 0 < length <= DATA_SIZE or command not in list(Command):
            return errno.EINVAL
        try:
            if command == Command.READ:
                self._bytes[DATA : DATA + length] = self._memory.read(address, length)
            else:
                self._memory.write(address, bytes(self._bytes[DATA : DATA + length]))
        except DmaRefusedError as error:
            return error.errno
        return 0

    def _set(self, register: Register, value: int) -> None:
        struct.pack_into("<I", self._bytes, register, value)
