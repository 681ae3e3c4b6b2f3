# SPDX-License-Identifier: Apache-2.0
"""
Writes events, one JSON object per line.

Every line has ``t`` (monotonic nanoseconds) and ``event``. The first is ``start`` and describes the
guest. Addresses and sizes are numbers of bytes; ranges are given as start and size. A full disk
ends the trace, not the job.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from time import monotonic_ns
from types import TracebackType
from typing import IO

import msgspec

from ramblock.text import encode_for_machines

__all__ = ["TraceWriter"]

#: Version of the format, in the ``start`` event.
TRACE_VERSION = 1


class TraceWriter:
    """
    A trace file; without a path, one that writes nothing.

    :param stream: Where to write instead, each line at once; stays open.
    :raises OSError: The file cannot be created.
    """

    def __init__(self, path: Path | None, *, stream: IO[bytes] | None = None) -> None:
        self.path = path
        #: Why writing stopped early, if it did.
        self.error: OSError | None = None
        #: Lines written.
        self.events = 0
        self._encode = msgspec.json.Encoder().encode
        self._lock = Lock()
        self._stream = stream
        self._file = stream if path is None else path.open("wb", buffering=1 << 20)

    @property
    def active(self) -> bool:
        """Whether events are written; callers need not build them otherwise."""
        return self._file is not None

    def emit(self, event: str, **fields: object) -> None:
        """Write one event; the time is taken under the lock, so lines are in order."""
        if self._file is None:
            return
        with self._lock:
            if self._file is None:
                return
            fields = {"t": monotonic_ns(), "event": event, **fields}
            line = self._encode_line(fields)
            try:
                self._file.write(line + b"\n")
                if self._stream is not None:
                    self._stream.flush()
                self.events += 1
            except OSError as error:
                self._give_up(error)

    def _encode_line(self, fields: dict[str, object]) -> bytes:
        # It may go to a terminal. A name that is no UTF-8 must not end the job.
        try:
            line = self._encode(fields)
        except UnicodeEncodeError:
            return encode_for_machines(fields)
        return line if line.isascii() and b"\x7f" not in line else encode_for_machines(fields)

    def close(self) -> None:
        """Write the buffered lines; a failure is in :attr:`error`."""
        with self._lock:
            if self._file is not None:
                try:
                    if self._stream is None:
                        self._file.close()
                except OSError as error:
                    self._give_up(error)
                self._file = None

    def _give_up(self, error: OSError) -> None:
        self.error = error
        file, self._file = self._file, None
        if file is not None and self._stream is None:
            try:
                file.close()
            except OSError:
                return  # it is full: the first error says so

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
