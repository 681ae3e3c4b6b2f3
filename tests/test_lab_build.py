"""How the lab is built, with the programs replaced: interrupted anywhere, resumed, and dry."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import build, busybox, double, emulator, kernel, packages, recorders, virtme
from lab.archive import mirror_from
from lab.cache import Cache
from lab.errors import CommandError, KernelOptionsError, LabError, MissingPackagesError
from lab.shell import Shell

_PACKAGE = "linux-source-7.3"
_VERSION = "7.3.4-1~bpo13+1"
_TARGETS = "Label: Debian\nRepo-URI: http://archive.example/debian/\n"
_POLICY = f"{_PACKAGE}:\n  Installed: (none)\n  Candidate: {_VERSION}\n"


class ScriptedShell(Shell):
    """Does what the programs would have done, as far as the lab looks at it."""

    def __init__(self, cache: Cache, *, stop_before: int | None = None) -> None:
        super().__init__(cache.logs)
        self.steps: list[str] = []
        self.lost_option: str | None = None
        self._stop_before = stop_before

    def run(
        self,
        command: Sequence[str | Path],
        *,
        what: str,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        describe: Callable[[bytes], str] | None = None,
    ) -> None:
        if len(self.steps) == self._stop_before:
            raise KeyboardInterrupt
        self.steps.append(what)
        words = [str(word) for word in command]
        if what == f"download of {_PACKAGE}":
            assert cwd is not None
            (cwd / f"{_PACKAGE}_{_VERSION.replace('+', '%2b')}_all.deb").touch()
        elif what == "unpacking of the source":
            assert words[2].endswith(f"/usr/src/{_PACKAGE}.tar.xz")
            (Path(words[-1].removeprefix("--directory=")) / _PACKAGE).mkdir()
        elif what == "kernel olddefconfig":
            assert cwd is not None
            options = kernel.FRAGMENT.read_text().splitlines()
            (cwd / ".config").write_text("\n".join(o for o in options if o != self.lost_option))
        elif what == "kernel":
            assert cwd is not None
            (cwd / "arch/x86/boot").mkdir(parents=True, exist_ok=True)
            (cwd / "arch/x86/boot/bzImage").touch()
        elif what == "kernel headers":
            Path(words[-1].split("=")[1]).mkdir()

    def ask(self, command: Sequence[str | Path]) -> str:
        words = [str(word) for word in command]
        if "indextargets" in words:
            return _TARGETS
        if "policy" in words:
            return _POLICY
        if "pkgnames" in words:
            return f"bash\nlinux-source-6.12\nlinux-source-7.2\n{_PACKAGE}\nlinux-source-7.3-x\n"
        assert "--print-uris" in words
        return "Reading...\n'http://archive.example/q.deb' qemu_1.deb 1 SHA256:0\n"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def _build_all(cache: Cache, shell: Shell) -> None:
    virtme.build(cache, shell)
    emulator.build(cache, shell)
    double.build(cache, shell)
    busybox.build(cache, shell)
    recorders.build(cache, shell)
    kernel.build(cache, shell, cache.root)


_PARTS = ["virtme", "qemu", "double", "busybox", "recorders", "kernel"]


def _whole(cache: Cache) -> list[str]:
    finders = {
        "virtme": virtme.find,
        "qemu": emulator.find,
        "double": double.find,
        "busybox": busybox.find,
        "recorders": recorders.find,
        "kernel": kernel.find,
    }
    return [name for name, find in finders.items() if find(cache)]


def test_build_ends_with_all_parts(cache: Cache) -> None:
    _build_all(cache, ScriptedShell(cache))

    entry = kernel.find(cache)
    assert _whole(cache) == _PARTS
    assert entry is not None
    assert entry.inputs["version"] == _VERSION
    assert (entry.path / kernel.IMAGE).exists()
    assert (entry.path / kernel.HEADERS).is_dir()


def test_build_interrupted_at_any_step_leaves_nothing_that_looks_whole(cache: Cache) -> None:
    complete = ScriptedShell(cache)
    _build_all(complete_cache := Cache(cache.root / "complete"), complete)
    assert _whole(complete_cache) == _PARTS

    for stop in range(len(complete.steps)):
        cut = Cache(cache.root / str(stop))
        with pytest.raises(KeyboardInterrupt):
            _build_all(cut, ScriptedShell(cut, stop_before=stop))

        step = complete.steps[stop]
        expected = []
        if stop > complete.steps.index("installation of virtme-ng"):
            expected.append("virtme")
        if stop > complete.steps.index("QEMU starts"):
            expected.append("qemu")
        if stop > complete.steps.index("firmware of the QEMU double by objcopy"):
            expected.append("double")
        if stop > complete.steps.index("busybox starts"):
            expected.append("busybox")
        if stop > complete.steps.index("bpftrace starts"):
            expected.append("recorders")
        assert _whole(cut) == expected, step

        _build_all(cut, ScriptedShell(cut))
        assert _whole(cut) == _PARTS, step


def test_interrupted_build_goes_on_with_what_is_there(cache: Cache) -> None:
    first = ScriptedShell(cache, stop_before=7)
    with pytest.raises(KeyboardInterrupt):
        kernel.build(cache, first, cache.root)
    second = ScriptedShell(cache)
    kernel.build(cache, second, cache.root)

    assert first.steps[-1] == "kernel options without debug information"
    assert "unpacking of the source" in first.steps
    assert not {"unpacking of the source", f"download of {_PACKAGE}"} & set(second.steps)
    assert "kernel" in second.steps


def test_option_that_the_kernel_did_not_take_is_named(cache: Cache) -> None:
    shell = ScriptedShell(cache)
    shell.lost_option = "CONFIG_IOMMUFD=y"

    with pytest.raises(KernelOptionsError, match="wanted CONFIG_IOMMUFD=y, got # CONFIG_IOMMUFD"):
        kernel.build(cache, shell, cache.root)

    assert "kernel" not in shell.steps  # ten minutes earlier than it would fail otherwise
    assert _whole(cache) == []


def test_lost_options() -> None:
    fragment = '# why\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="text"\n# CONFIG_D is not set\n'
    config = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="text"\nCONFIG_E=y\n'

    assert kernel.lost_options(fragment, config) == [
        ("CONFIG_A=y", "# CONFIG_A is not set"),
        ("# CONFIG_B is not set", "CONFIG_B=y"),
    ]


def test_changed_fragment_asks_for_another_kernel(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel.build(cache, ScriptedShell(cache), cache.root)
    changed = tmp_path / "kernel.config"
    changed.write_text(kernel.FRAGMENT.read_text() + "CONFIG_MORE=y\n")
    monkeypatch.setattr(kernel, "FRAGMENT", changed)

    assert kernel.find(cache) is None


@pytest.mark.parametrize(
    ("targets", "mirror"),
    [
        (_TARGETS, "http://archive.example/debian"),
        ("Label: Debian-Security\nRepo-URI: http://archive.example/debian-security/\n", None),
        ("Label: Ubuntu\nRepo-URI: http://archive.example/ubuntu/\n", None),
        # Before the first apt-get update no label is known.
        ("Repo-URI: http://a.example/tools/\n\nRepo-URI: http://b.example/debian\n", "http://b.example/debian"),
        ("", None),
    ],
)  # fmt: skip
def test_mirror_is_the_one_that_apt_uses(targets: str, mirror: str | None) -> None:
    assert mirror_from(targets) == mirror


def test_without_a_mirror_the_message_says_how_to_give_one(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.archive.mirror_from", lambda _: None)

    with pytest.raises(LabError, match="set RAMBLOCK_LAB_MIRROR"):
        emulator.build(cache, ScriptedShell(cache))


def test_missing_packages_are_named_to_those_who_may_not_install(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "missing_packages", lambda _: ["bc", "flex"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    shell = ScriptedShell(cache)

    with pytest.raises(MissingPackagesError, match="apt-get install bc flex"):
        packages.provide(shell)

    assert shell.steps == []


def test_dry_run_prints_the_commands_and_touches_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "check_machine", lambda: None)
    monkeypatch.setattr(packages, "missing_packages", lambda _: ["bc"])
    monkeypatch.setattr(Shell, "ask", lambda *_: _TARGETS)

    build.provide(cache, dry_run=True)

    printed = capsys.readouterr().out
    for part in (
        "-m venv",
        "virtme-ng==",
        "install --yes --no-install-recommends bc",
        "qemu-system-x86",
        "busybox-static",
        "trace-cmd",
        "linux-perf",
        "bpftrace",
        "double/shim.so",
        "double/firmware.bin",
    ):
        assert part in printed
    for part in ("linux-source-7", "tinyconfig", "bzImage", "headers_install"):
        assert part in printed
    assert not cache.root.exists()


def test_own_kernel_and_qemu_need_no_build_of_ours(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    virtme.build(cache, ScriptedShell(cache))

    lab = build.provide(cache, own_kernel=tmp_path / "k", own_qemu=tmp_path / "q")

    assert (lab.kernel, lab.qemu) == (tmp_path / "k", tmp_path / "q")
    assert (lab.headers, lab.busybox, lab.double, lab.recorders) == (None,) * 4
    assert capsys.readouterr().err == ""


def test_failed_program_is_shown_with_the_end_of_its_output(cache: Cache) -> None:
    shell = Shell(cache.logs)

    with pytest.raises(
        CommandError, match=r"(?s)step two: exit code 3; .*ended with.*why"
    ) as caught:
        shell.run(["sh", "-c", "seq 100; echo why >&2; exit 3"], what="step two")

    assert caught.value.status == 3
    assert caught.value.log is not None
    assert caught.value.log.read_text().startswith("1\n2\n")
    assert "\n80\n" not in str(caught.value)


def test_output_is_described_line_by_line(cache: Cache) -> None:
    lines: list[bytes] = []

    def describe(line: bytes) -> str:
        lines.append(line)
        return ""

    Shell(cache.logs).run(["printf", "one\ntwo\n"], what="step", describe=describe)

    assert lines == [b"one", b"two"]


def test_interrupted_step_ends_all_that_it_started(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(_line: bytes) -> str:
        raise KeyboardInterrupt

    shell = Shell(cache.logs)
    with pytest.raises(KeyboardInterrupt):
        shell.run(["sh", "-c", "sleep 600 & echo $!; wait"], what="step", describe=interrupt)

    child = (cache.logs / "build-step.log").read_text().strip()
    stat = Path(f"/proc/{child}/stat")
    for _ in range(100):  # killed is not gone at once
        if not stat.exists() or stat.read_text().split()[2] == "Z":  # a zombie is nobody's program
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there")


def test_makes_own_variables_do_not_reach_what_it_starts(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKEFLAGS", "-j4 -- PYTHON=python3")

    Shell(cache.logs).run(
        ["sh", "-c", "echo [$MAKEFLAGS] [$EXTRA]"], what="x", environment={"EXTRA": "1"}
    )

    assert (cache.logs / "build-x.log").read_text() == "[] [1]\n"


def test_kernel_is_named_for_the_fragment_it_was_built_with(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = tmp_path / "kernel.config"
    edited.write_text("CONFIG_A=y\n")
    monkeypatch.setattr(kernel, "FRAGMENT", edited)

    class EditedMeanwhile(ScriptedShell):
        def run(self, command: Sequence[str | Path], **options: Any) -> None:
            super().run(command, **options)
            if options["what"] == "kernel":
                edited.write_text("CONFIG_B=y\n")

    kernel.build(cache, EditedMeanwhile(cache), cache.root)

    assert kernel.find(cache) is None
    edited.write_text("CONFIG_A=y\n")
    assert kernel.find(cache) is not None
