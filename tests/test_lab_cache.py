"""The lab's cache: found by inputs, whole or not there, one builder at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.cache import Cache, key_of


def _publish(cache: Cache, inputs: dict[str, str], *, now: float = 1.0) -> Path:
    work = cache.scratch("thing")
    (work / "file").write_text("content")
    return cache.publish(work, "kernel", inputs, now=now).path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_key_depends_on_every_input_and_on_nothing_else() -> None:
    key = key_of({"recipe": "1", "fragment": "a"})

    assert key == key_of({"fragment": "a", "recipe": "1"})
    assert key != key_of({"recipe": "2", "fragment": "a"})
    assert key != key_of({"recipe": "1", "fragment": "b"})
    assert key != key_of({"recipe": "1", "fragment": "a", "version": "7"})


def test_published_build_is_found_by_its_inputs(cache: Cache) -> None:
    path = _publish(cache, {"recipe": "1", "version": "7.3"})

    for inputs in ({"recipe": "1", "version": "7.3"}, {"recipe": "1"}):
        found = cache.find("kernel", inputs)
        assert found is not None
        assert found.path == path
    assert (path / "file").read_text() == "content"
    assert cache.find("kernel", {"recipe": "2"}) is None
    assert cache.find("qemu", {"recipe": "1"}) is None


def test_newest_of_several_is_found(cache: Cache) -> None:
    _publish(cache, {"recipe": "1", "version": "7.2"}, now=2.0)
    newest = _publish(cache, {"recipe": "1", "version": "7.3"}, now=3.0)
    _publish(cache, {"recipe": "1", "version": "7.4"}, now=1.0)

    found = cache.find("kernel", {"recipe": "1"})

    assert found is not None
    assert found.path == newest


def test_build_that_was_not_published_is_not_there(cache: Cache) -> None:
    (cache.scratch("thing") / "file").write_text("half")

    assert list(cache.entries("kernel")) == []


def test_folder_without_a_manifest_is_not_there_and_gives_way(cache: Cache) -> None:
    inputs = {"recipe": "1"}
    path = _publish(cache, inputs)
    (path / "manifest.json").unlink()

    assert cache.find("kernel", inputs) is None
    assert _publish(cache, inputs) == path
    assert cache.find("kernel", inputs) is not None


def test_scratch_is_empty_each_time(cache: Cache) -> None:
    (cache.scratch("thing") / "file").touch()

    assert list(cache.scratch("thing").iterdir()) == []


def test_cache_is_where_people_expect_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().root == tmp_path / "xdg" / "ramblock-lab"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().root == tmp_path / ".cache" / "ramblock-lab"


def test_lock_is_seen_by_others_and_let_go(cache: Cache) -> None:
    assert not cache.is_locked()
    with cache.lock():
        assert cache.is_locked()
    assert not cache.is_locked()


def test_lock_outlives_its_holder_in_a_program_that_inherited_it(cache: Cache) -> None:
    with cache.lock() as fd:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[fd],
        )
    assert cache.is_locked()
    child.communicate()
    assert not cache.is_locked()


def test_removal_that_was_interrupted_leaves_no_entry(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _publish(cache, {"recipe": "1"})

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lab.cache.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.remove(path)
    assert (path / "file").exists()
    assert cache.find("kernel", {"recipe": "1"}) is None
