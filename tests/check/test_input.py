"""Bytes of recordings: compressed, cut, corrupt, from standard input."""

import bz2
import gzip
import io
import lzma
import sys
from pathlib import Path

import pytest
import zstandard

from ramblock.check.input import open_input, read_chunks
from ramblock.errors import TraceError, UsageError

_DATA = b"".join(b"line %d of a recording\n" % number for number in range(20_000))


def _read(path: Path) -> bytes:
    with open_input(str(path)) as stream:
        return b"".join(read_chunks(stream, str(path)))


@pytest.mark.parametrize(
    "content",
    [
        _DATA,
        gzip.compress(_DATA),
        gzip.compress(_DATA[:999]) + gzip.compress(_DATA[999:]),
        lzma.compress(_DATA),
        lzma.compress(_DATA[:999]) + bytes(8) + lzma.compress(_DATA[999:]),
        bz2.compress(_DATA),
        bz2.compress(_DATA[:999]) + bz2.compress(_DATA[999:]),
        zstandard.compress(_DATA),
        zstandard.compress(_DATA[:999]) + zstandard.compress(_DATA[999:]),
    ],
    ids=[
        "plain",
        "gzip",
        "two members",
        "xz",
        "two padded streams",
        "bzip2",
        "two bzip2 streams",
        "zstd",
        "two frames",
    ],
)
def test_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert _read(path) == _DATA


@pytest.mark.parametrize("content", [b"", b"\x1f", b"{", b"\x28\xb5", b"\xfd7z", b"BZ", b"BZhello"])
def test_very_short(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert _read(path) == content


@pytest.mark.parametrize(
    "compress", [gzip.compress, lzma.compress, bz2.compress, zstandard.compress]
)
def test_cut(tmp_path: Path, compress: object) -> None:
    """What can be read is; then comes the error."""
    content = compress(_DATA)  # type: ignore[operator]
    path = tmp_path / "x"
    path.write_bytes(content[: len(content) * 2 // 3])
    chunks: list[bytes] = []
    with open_input(str(path)) as stream, pytest.raises(TraceError, match="ends in the middle"):
        chunks.extend(read_chunks(stream, "x"))
    found = b"".join(chunks)
    assert _DATA.startswith(found)
    assert found or compress is not gzip.compress


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        lzma.compress,
        bz2.compress,
        zstandard.ZstdCompressor(write_checksum=True).compress,
    ],
)
def test_corrupt(tmp_path: Path, compress: object) -> None:
    content = bytearray(compress(_DATA))  # type: ignore[operator]
    content[len(content) // 2] ^= 0xFF
    content[len(content) // 2 + 1] ^= 0xFF
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"corrupt|ends in the middle"):
        _read(path)


@pytest.mark.parametrize(
    "compress", [gzip.compress, lzma.compress, bz2.compress, zstandard.compress]
)
def test_a_small_file_that_holds_a_large_one(tmp_path: Path, compress: object) -> None:
    path = tmp_path / "x"
    path.write_bytes(compress(bytes(200 << 20)))  # type: ignore[operator]
    with open_input(str(path)) as stream:
        sizes = [len(chunk) for chunk in read_chunks(stream, "x")]
    assert sum(sizes) == 200 << 20
    assert max(sizes) <= 8 << 20


def test_a_pipe_that_gives_one_byte_at_a_time() -> None:
    class Slow(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self._rest = iter(data)

        def read(self, size: int = -1) -> bytes:
            return bytes([byte]) if (byte := next(self._rest, None)) is not None else b""

    for compress in (bytes, gzip.compress, lzma.compress, bz2.compress, zstandard.compress):
        content = compress(_DATA[:500])
        assert b"".join(read_chunks(Slow(content), "x")) == _DATA[:500]  # type: ignore[arg-type]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"), open_input(str(tmp_path / "x")):
        pass
    with pytest.raises(TraceError, match="directory"):
        _read(tmp_path)


def test_without_the_package_for_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "x"
    path.write_bytes(zstandard.compress(_DATA))
    with pytest.raises(UsageError) as caught:
        _read(path)
    assert "ramblock[zstd]" in str(caught.value.expected)
