"""Which tests run where in the lab, what their outcomes add up to, and the command line."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli, suite
from lab.build import Lab
from lab.cache import Cache
from lab.errors import LabError, LostVmError
from lab.junit import Counts, read
from lab.suite import HOST, Outcome, Part
from lab.variants import VARIANTS
from lab.vm import Machine, Result, Work

_REPORT = """<?xml version="1.0"?><testsuites>
<testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/>
</testsuites>"""


def test_counts_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(_REPORT)

    counts = read(tmp_path / "report.xml")

    assert counts == Counts(passed=4, failed=3, skipped=3)
    assert str(counts) == "4 passed, 3 failed, 3 skipped"


def test_report_that_is_not_whole_has_no_counts(tmp_path: Path) -> None:
    assert read(tmp_path / "missing.xml") is None
    (tmp_path / "half.xml").write_text(_REPORT[:60])
    assert read(tmp_path / "half.xml") is None


def test_everything_runs_in_every_part_unless_somebody_chooses() -> None:
    found = suite.parts([HOST, "one-vcpu"], ["-x"])

    assert [(p.name, p.arguments, p.may_be_empty) for p in found] == [
        (HOST, ["-x", "tests/lab/host"], False),
        ("one-vcpu", ["-x", "tests/lab"], False),
    ]
    assert all(p.may_be_empty for p in suite.parts([HOST, "one-vcpu"], ["-k", "name"]))


def test_path_runs_where_it_can() -> None:
    inside, host = "tests/lab/test_machine.py::test_a", "tests/lab/host/test_uapi.py"

    assert [(p.name, p.arguments) for p in suite.parts([HOST, "no-iommu"], [inside])] == [
        ("no-iommu", [inside])
    ]
    assert [(p.name, p.arguments) for p in suite.parts([HOST, "no-iommu"], [host, "-q"])] == [
        (HOST, ["-q", host])
    ]


def _outcome(
    passed: int = 1, failed: int = 0, *, name: str = "x", bad: bool = False, lost: bool = False
) -> Outcome:
    return Outcome(name=name, counts=Counts(passed, failed), failed=bad, lost=lost, remarks=["why"])


def test_summary_ends_with_a_line_of_counts_for_each_part_and_for_all() -> None:
    text = suite.summary([_outcome(2, name="host"), _outcome(3, 1, name="no-iommu", bad=True)])

    assert text.splitlines() == [
        "host: why",
        "no-iommu: why",
        "host: 2 passed, 0 failed, 0 skipped",
        "no-iommu: 3 passed, 1 failed, 0 skipped",
        "5 passed, 1 failed, 0 skipped",
    ]


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([_outcome(), _outcome()], 0),
        ([_outcome(), _outcome(0)], 0),
        ([_outcome(0)], 1),
        ([], 1),
        ([_outcome(), _outcome(bad=True)], 1),
        ([_outcome(bad=True), _outcome(0, bad=True, lost=True)], 125),
    ],
)
def test_exit_code_tells_failed_tests_from_a_failed_lab(outcomes: list[Outcome], code: int) -> None:
    assert suite.exit_code(outcomes) == code


class FakeMachine:
    """A VM in which pytest ends with *status* and leaves *report*."""

    variant = VARIANTS["no-iommu"]

    def __init__(
        self, folder: Path, *, status: int, report: str | None, broken: bool = False
    ) -> None:
        self._folder = folder
        self._status = status
        self._broken = broken
        if report is not None:
            (folder / "report.xml").write_text(report)

    def run(self, _: Work, *, show: object, collect: Callable[[Path], object]) -> Result:
        collect(self._folder)
        if self._status < 0:
            raise LostVmError("a panic", Path("/the.log"))
        return Result(
            status=self._status,
            log=Path("/the.log"),
            boot_seconds=5,
            seconds=61,
            broken=["Oops: 0000"] if self._broken else [],
            dubious=[],
        )


_PASSED = '<testsuites><testsuite errors="0" failures="0" skipped="0" tests="2"/></testsuites>'
_SKIPPED = '<testsuites><testsuite errors="0" failures="0" skipped="2" tests="2"/></testsuites>'
_EMPTY = '<testsuites><testsuite errors="0" failures="0" skipped="0" tests="0"/></testsuites>'


@pytest.mark.parametrize(
    ("status", "report", "broken", "failed", "remark"),
    [
        (0, _PASSED, False, False, "booted in 5s, tests took 1m01s; log: /the.log"),
        (
            1,
            _REPORT,
            False,
            True,
            "3 tests were skipped: what is skipped in the lab should have run",
        ),
        (5, _EMPTY, False, True, "no test ran"),
        (0, _SKIPPED, False, True, "no test ran"),
        (0, None, False, True, "pytest wrote no report; its exit code is 0"),
        (3, _PASSED, False, True, "pytest's exit code is 3"),
        (0, _PASSED, True, True, "the kernel is broken: Oops: 0000"),
        (-1, None, False, True, "the VM was lost: a panic; see /the.log"),
    ],
)
def test_outcome_of_a_variant(
    tmp_path: Path, status: int, report: str | None, broken: bool, failed: bool, remark: str
) -> None:
    machine = FakeMachine(tmp_path, status=status, report=report, broken=broken)
    part = Part(name="no-iommu", arguments=["tests/lab"], may_be_empty=False)

    outcome = suite.run_variant(machine, part, timeout=10)  # type: ignore[arg-type]

    assert outcome.failed == failed
    assert outcome.lost == (status < 0)
    assert remark in outcome.remarks[0]


def test_choice_of_tests_may_leave_none_for_a_part(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, status=5, report=_EMPTY)
    part = Part(name="no-iommu", arguments=["-k", "x"], may_be_empty=True)

    assert not suite.run_variant(machine, part, timeout=10).failed  # type: ignore[arg-type]


def test_guest_gets_what_this_python_needs() -> None:
    part = Part(name="no-iommu", arguments=["tests/lab"], may_be_empty=False)
    work = suite.work_for(part, 10)

    assert Path(sys.prefix).resolve() in work.places
    assert work.environment["RAMBLOCK_REQUIRE"] == "lab,kvm,root"
    assert work.environment["RAMBLOCK_LAB_VARIANTS"].split(",") == list(VARIANTS)
    assert work.command.startswith(sys.executable)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab = Lab(
        kernel=Path("/k"),
        qemu=Path("/q"),
        headers=None,
        busybox=None,
        double=Path("/d"),
        recorders=None,
        launcher=("virtme",),
    )
    monkeypatch.setattr("lab.build.provide", lambda *_, **__: lab)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_build")
def test_dry_run_prints_what_would_be_booted(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["boot", "--dry-run", "--variant", "one-vcpu", "--", "ls", "-l", "a b"])

    printed = capsys.readouterr().out
    assert code == 0
    assert printed.startswith("virtme --kimg /k --qemu-bin /q ")
    assert "--cpus 1" in printed
    assert "ls -l" in printed


@pytest.mark.usefixtures("no_build")
def test_dry_run_of_the_tests_prints_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["test", "--dry-run", "-k", "name"]) == 0

    printed = capsys.readouterr().out
    assert printed.count("virtme --kimg") == len(VARIANTS)
    assert "tests/lab/host" not in printed.replace("--ignore=tests/lab/host", "")  # no headers here


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("status", "code"), [(0, 0), (7, 7)], ids=["command succeeded", "command failed"]
)
def test_boot_ends_with_the_exit_code_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: int
) -> None:
    fake = FakeMachine(tmp_path, status=status, report=None)
    result = fake.run(None, show=None, collect=lambda _: None)  # type: ignore[arg-type]
    monkeypatch.setattr(Machine, "run", lambda *_, **__: result)

    assert cli.main(["boot", "--", "true"]) == code


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize("error", [LabError("no room"), LostVmError("a panic", Path("/the.log"))])
def test_lab_that_failed_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: LabError
) -> None:
    def fail(*_: object, **__: object) -> Result:
        raise error

    monkeypatch.setattr(Machine, "run", fail)

    assert cli.main(["boot", "--", "true"]) == 125
    assert capsys.readouterr().err == f"lab: error: {error}\n"


def test_option_that_nobody_knows_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["build", "--colour"])

    assert caught.value.code == 2


def test_clean_keeps_the_current_lab_unless_all_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = Cache()
    work = cache.scratch("x")
    current = cache.publish(work, "virtme", {"current": "yes"}, now=1)
    other = cache.publish(cache.scratch("x"), "virtme", {"current": "no"}, now=2)
    cache.scratch("apt")
    monkeypatch.setitem(cli.FINDERS, "virtme", lambda c: c.find("virtme", {"current": "yes"}))

    assert cli.main(["clean"]) == 0
    assert current.path.exists()
    assert not other.path.exists()
    assert not cache.work("apt").exists()

    assert cli.main(["clean", "--all"]) == 0
    assert not current.path.exists()
