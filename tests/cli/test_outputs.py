"""Files that the commands write: no input, no other output, whole or not at all."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ramblock.cli import main
from ramblock.cli.outputs import OutputFile, refuse_shared
from ramblock.errors import RamblockError, UsageError
from trace_samples import DATA

_TRACE = "run-soft.jsonl.gz"


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / _TRACE
    path.write_bytes((DATA / _TRACE).read_bytes())
    return path


def _other_names(path: Path) -> Iterator[Path]:
    """Yield names of a file, each of another kind."""
    folder = path.parent
    yield path
    yield folder / "." / ".." / folder.name / path.name
    (folder / "folder").mkdir()
    yield folder / "folder" / ".." / path.name
    for kind in ("hard", "soft"):
        link = folder / f"{kind}-link"
        if kind == "hard":
            link.hardlink_to(path)
        else:
            link.symlink_to(path)
        yield link
    (folder / "linked").symlink_to(folder)
    yield folder / "linked" / path.name


def test_an_input_under_any_name_is_no_output(trace: Path, tmp_path: Path) -> None:
    for name in _other_names(trace):
        with pytest.raises(UsageError, match="is the same file as the input"):
            refuse_shared({"--report": name}, [str(trace)])
    refuse_shared({"--report": tmp_path / "other"}, [str(trace)])


def test_two_outputs_under_any_names_are_two_files(tmp_path: Path) -> None:
    """Also where the file is not there yet."""
    path = tmp_path / "x"
    (tmp_path / "dangling").symlink_to(path)
    for name in (path, tmp_path / "." / "x", tmp_path / "dangling"):
        with pytest.raises(UsageError, match=r"--perfetto .* is the same file as --report"):
            refuse_shared({"--report": path, "--perfetto": name}, [])
    refuse_shared({"--report": path, "--perfetto": tmp_path / "y"}, [])
    refuse_shared({"--report": Path(os.devnull), "--perfetto": Path(os.devnull)}, [])


@pytest.mark.parametrize("place", ["-", "/dev/stdin", "/proc/self/fd/0"])
def test_standard_input_is_an_input(place: str, trace: Path) -> None:
    before = trace.read_bytes()
    with trace.open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "ramblock", "check", place, "--report", str(trace)],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "is the same file as the input" in done.stderr
    assert trace.read_bytes() == before


def test_standard_output_is_an_output(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "ramblock", "check", str(trace), "--perfetto", str(path)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "is the same file as standard output" in done.stderr


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize(
    "command",
    [
        "check {trace} --report {link}",
        "check {trace} --perfetto {link}",
        "check --merge {other} {trace} --perfetto {link}",
        "check {other} --report x --perfetto ./x",
        "run --workload {trace} --trace {link}",
        "run --workload {trace} --report {link}",
        "run {toml} --trace {toml}",
        "run --trace x --report ./x",
        "plan {trace} --plot {link}",
        "plan --sweep memory=1G,2G --plot x.csv --table ./x.csv",
        "probe --socket x --trace ./x",
        "probe --socket x --trace {link} --expect virtio-mem --qmp {trace}",
    ],
)
def test_every_command_refuses(
    command: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").hardlink_to(trace)
    toml = tmp_path / "s.toml"
    toml.write_text("[run]\nseed = 2\n")
    files = {"trace": trace, "link": tmp_path / "link", "toml": toml, "other": DATA / _TRACE}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(command.format(**files).split()) == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with suppress(KeyboardInterrupt), OutputFile("--report", path) as stream:
        stream.write(b"half")
        stream.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with OutputFile("--report", path) as stream:
        stream.write(b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "link"
    link.symlink_to(path)
    with OutputFile("--report", link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_permissions_are_those_of_open(tmp_path: Path, umask: int) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    old.chmod(0o604)
    for path in (new, old):
        with OutputFile("--report", path):
            pass
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(old.stat().st_mode) == 0o604


def test_a_special_file_is_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with OutputFile("--perfetto", pipe) as stream:
        stream.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


def test_standard_output_by_name(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ramblock", "check", str(trace), "--perfetto", "/dev/stdout"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"traceEvents"' in done.stdout
    assert "Nothing found" in done.stdout


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        OutputFile("--report", tmp_path / "missing" / "x")
    with pytest.raises(UsageError, match="directory"):
        OutputFile("--report", tmp_path)
    with (
        pytest.raises(RamblockError, match="--report /dev/full: No space left"),
        OutputFile("--report", Path("/dev/full")) as stream,
    ):
        stream.write(b"x")


@pytest.mark.usefixtures("capsys")
def test_a_check_that_fails_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.html"
    path.write_text("old")
    monkeypatch.setattr("ramblock.report.page.write_page", _out_of_memory)
    assert main(["check", str(DATA / _TRACE), "--report", str(path)]) == 5
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _out_of_memory(*_: object, **__: object) -> None:
    raise MemoryError
