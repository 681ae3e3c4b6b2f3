"""Formats by name: ours, one that a program registers, one of an installed package."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramblock.check import check_file
from ramblock.check.job import CheckOptions
from ramblock.check.readers import ReaderOptions
from ramblock.errors import UsageError
from ramblock.trace.events import Source
from ramblock.trace.readers import registry
from ramblock.trace.readers.registry import GROUP, make_reader, names

# A whole package that adds a format: one module, and one line of metadata.
_MODULE = '''
from ramblock.trace.events import Attributes, Event, Map
from ramblock.trace.readers.base import LineReader
from ramblock.trace.readers.registry import register


@register("tiny", claims=lambda head: head.startswith(b"tiny trace\\n"))
class TinyReader(LineReader):
    """Lines of `map|private TIME START END`."""

    def _line(self, raw: bytes, number: int, found: list[Event]) -> None:
        words = raw.split()
        if len(words) != 4 or words[0] not in (b"map", b"private"):
            self.counts.note_unknown(number, raw)
            return
        time, start, end = (int(word, 0) for word in words[1:])
        if words[0] == b"map":
            found.append(Map(time, self.source, number, "tiny", start, end))
        else:
            found.append(Attributes(time, self.source, number, start, end, True))
        self.counts.note(words[0].decode())
'''
_TRACE = (
    "tiny trace\nmap 1000 0x1000 0x2000\nprivate 9000000000 0x1000 0x2000\nmap 99000000000 0 1\n"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package beside this one, as pip would install it."""
    (tmp_path / "tiny_traces.py").write_text(_MODULE)
    info = tmp_path / "tiny_traces-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-traces\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ntiny = tiny_traces:TinyReader\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.metadata.MetadataPathFinder().invalidate_caches()
    trace = tmp_path / "x.tiny"
    trace.write_text(_TRACE)
    yield trace
    for known in (registry._readers, registry._claims):
        known.pop("tiny", None)
    sys.modules.pop("tiny_traces", None)


def test_names_of_ours() -> None:
    assert {"bpftrace", "ftrace", "perf", "qemu", "ramblock", "simpletrace"} <= set(names())


def test_a_format_of_another_package(package: Path) -> None:
    assert "tiny" in names()
    # by the name, and by how the file begins
    for options in (CheckOptions(reader=ReaderOptions(format="tiny")), CheckOptions()):
        result = check_file(str(package), options)
        assert result.error is None
        assert result.by_event == {"map": 2, "private": 1}
        assert result.failures()


def test_its_mistakes_are_no_tracebacks(package: Path) -> None:
    reader = make_reader("tiny", Source("f", "tiny"))
    assert len(reader.feed(b"map 1 2 3\nmap x y z\n")) == 1
    with pytest.raises(Exception, match=r"^f:2: the reader failed: ValueError"):
        reader.finish()


def test_no_such_format() -> None:
    with pytest.raises(UsageError, match="format 'elf'"):
        make_reader("elf", Source("f", "elf"))


def test_a_reader_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys; from ramblock.trace.readers.registry import names; names();"
        "print([name for name in sys.modules if name.startswith('ramblock.trace.readers.')])"
    )
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "formats." not in child.stdout
    assert "qemu" not in child.stdout
