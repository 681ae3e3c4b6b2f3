# SPDX-License-Identifier: Apache-2.0
"""
Bytes of a recording: a file, or standard input.

As it is, or compressed with gzip, xz, bzip2 or Zstandard.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from ramblock.errors import TraceError, UsageError

__all__ = ["STDIN", "open_input", "read_chunks"]

#: The name that means standard input.
STDIN = "-"

_CHUNK = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_XZ, _BZIP2 = b"\xfd7zXZ\x00", b"BZh"
#: Bytes that one step of decompression may give: a small file may hold a very large one.
_MOST = 1 << 20
#: Bytes that an xz stream's dictionary may take; that of `xz -9` takes 65 MiB.
_MOST_XZ = 128 << 20


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """
    Open a file, or standard input for ``-``.

    :raises TraceError: It cannot be opened.
    """
    if path == STDIN:
        yield sys.stdin.buffer
        return
    try:
        stream = Path(path).open("rb", buffering=0)  # noqa: SIM115 - closed below in any case
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}", path=path) from error
    with stream:
        yield stream


def read_chunks(stream: IO[bytes], path: str) -> Iterator[bytes]:
    """
    Yield the file's content, decompressed, in pieces of at most 1 MiB.

    :raises TraceError: It cannot be read further, or its compression is corrupt or cut. Earlier
        pieces are good.
    :raises UsageError: It is compressed with Zstandard, and the package for that is not installed.
    """
    chunks = _raw_chunks(stream, path)
    first = next(chunks, b"")
    while first and len(first) < len(_XZ):  # a pipe may give one byte at a time
        more = next(chunks, b"")
        if not more:
            break
        first += more
    if first.startswith(_GZIP):
        yield from _gunzip(first, chunks, path)
    elif first.startswith(_ZSTD):
        yield from _unzstd(first, chunks, path)
    elif first.startswith(_XZ):
        import lzma

        make = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_MOST_XZ)
        yield from _unpack(first, chunks, path, "xz", make, lzma.LZMAError)
    elif first.startswith(_BZIP2) and first[3:4].isdigit():
        import bz2

        yield from _unpack(first, chunks, path, "bzip2", bz2.BZ2Decompressor, OSError)
    else:
        if first:
            yield first
        yield from chunks


def _raw_chunks(stream: IO[bytes], path: str) -> Iterator[bytes]:
    # A pipe's reader is not made to wait for a whole chunk.
    read = getattr(stream, "read1", stream.read)
    while True:
        try:
            chunk = read(_CHUNK)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror}", path=path) from error
        if not chunk:
            return
        yield chunk


def _gunzip(first: bytes, chunks: Iterator[bytes], path: str) -> Iterator[bytes]:
    """
    Decompress members one after the other, as gzip(1) does.

    Not with the gzip module, which loses the end of a file that is cut.
    """
    member = zlib.decompressobj(wbits=31)
    data: bytes | None = first
    while data is not None:
        try:
            while data:
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
                output = member.decompress(data, _MOST)
                data = member.unconsumed_tail or (member.unused_data if member.eof else b"")
                if output:
                    yield output
        except zlib.error as error:
            raise TraceError(f"{path}: its gzip data is corrupt: {error}", path=path) from error
        data = next(chunks, None)
    if not member.eof:
        yield from _nonempty(member.flush())
        raise TraceError(f"{path}: the file ends in the middle of its gzip data", path=path)


class _Stream(Protocol):
    """A decompressor of the standard library, for one stream of perhaps several."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _unpack(
    first: bytes,
    chunks: Iterator[bytes],
    path: str,
    name: str,
    make: Callable[[], _Stream],
    corrupt: type[Exception],
) -> Iterator[bytes]:
    """Decompress streams one after the other, as xz(1) and bzip2(1) do."""
    stream = make()
    data: bytes | None = first
    while data is not None:
        try:
            while data or not (stream.eof or stream.needs_input):
                if stream.eof:
                    data = data.lstrip(b"\0")  # xz pads with zeros between streams
                    if not data:
                        break
                    stream = make()
                output = stream.decompress(data, _MOST)
                data = stream.unused_data if stream.eof else b""
                if output:
                    yield output
        except corrupt as error:
            raise TraceError(f"{path}: its {name} data is corrupt: {error}", path=path) from error
        data = next(chunks, None)
    if not stream.eof:
        raise TraceError(f"{path}: the file ends in the middle of its {name} data", path=path)


def _nonempty(data: bytes) -> Iterator[bytes]:
    if data:
        yield data


def _unzstd(first: bytes, chunks: Iterator[bytes], path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            f"{path} is compressed with Zstandard",
            expected="the package zstandard: pip install 'ramblock[zstd]'",
        ) from None
    frame: Any = None
    data: bytes | None = first
    while data is not None:
        try:
            while data:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                # At most 128 KiB for each 128 KiB block of input, but blocks may be tiny: so little
                # input at a time.
                output = frame.decompress(data[:_ZSTD_STEP])
                data = (frame.unused_data if frame.eof else b"") + data[_ZSTD_STEP:]
                if output:
                    yield output
        except zstandard.ZstdError as error:
            raise TraceError(
                f"{path}: its Zstandard data is corrupt: {error}", path=path
            ) from error
        data = next(chunks, None)
    if frame is not None and not frame.eof:
        raise TraceError(f"{path}: the file ends in the middle of its Zstandard data", path=path)


#: A block of four bytes may stand for 128 KiB (RFC 8878, section 3.1.1.2), so this much input gives
#: 8 MiB at most.
_ZSTD_STEP = 256
