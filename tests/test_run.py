"""`ramblock run`, from inside and as a command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pseudo_terminal import on_terminal
from ramblock.errors import TraceError, UsageError
from ramblock.run import Run, RunReport, Scenario, load_scenario, load_workload, workload_names
from ramblock.run.faults import FaultPlan
from ramblock.run.guest_script import Action, GuestScript, Request, swiotlb_size
from ramblock.run.layout import plan_layout
from ramblock.run.scenario import Devices, Guest, Job, Size
from ramblock.run.tally import Tally
from ramblock.testing import ViolationKind
from ramblock.units import GIB, MIB, PAGE_SIZE

_EXAMPLES = Path(__file__).parent.parent / "examples"
_SMALL = Guest(memory=Size(256 * MIB))


class _Silent:
    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        pass


def execute(
    *, guest: Guest = _SMALL, devices: Devices | None = None, trace: Path | None = None, **job: Any
) -> RunReport:
    settings: dict[str, Any] = {"conversions": 1500, **job}
    scenario = Scenario(guest=guest, devices=devices or Devices(), run=Job(**settings))
    return Run(scenario, trace).execute(_Silent())


def command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ramblock", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# -- the whole job --------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", workload_names())
@pytest.mark.parametrize("policy", ["page", "run"])
def test_every_workload_is_clean_under_both_policies(workload: str, policy: str) -> None:
    devices = Devices(policy=policy)  # type: ignore[arg-type]  # one of its literals
    report = execute(devices=devices, workload=workload)
    assert report.verifier.clean, report.verifier.violations()
    assert report.exit_code == 0
    assert report.tally.requests == 1500
    assert report.verifier.checks > 1500
    total = report.devices_total()
    assert total.accesses > 0
    assert total.faults_own == 0
    assert total.forbidden == total.forbidden_faulted > 0
    assert not report.device_errors


def test_the_same_seed_gives_the_same_conversions_and_state() -> None:
    def essence(seed: int) -> tuple[object, ...]:
        report = execute(seed=seed)
        tally = report.tally
        return (
            dict(tally.outcomes),
            dict(tally.reasons),
            tally.map_calls,
            tally.unmap_calls,
            report.state_hash,
        )

    assert essence(7) == essence(7)
    assert essence(7) != essence(8)


def test_memory_is_really_freed() -> None:
    report = execute()
    assert report.freed_bytes > 100 * PAGE_SIZE
    assert report.not_freed_bytes == 0


def test_without_coordination_mappings_go_stale() -> None:
    report = execute(uncoordinated=True)
    assert report.exit_code == 1
    kinds = report.verifier.counts
    assert kinds[ViolationKind.STALE]
    assert kinds[ViolationKind.FREED]
    assert kinds[ViolationKind.DEVICE_REACHED_PRIVATE]
    assert kinds[ViolationKind.LOST_WRITE]
    assert report.orphaned_bytes > 0
    assert {violation.target for violation in report.verifier.violations()} == {"iommu0", "iommu1"}
    assert report.devices_total().forbidden_faulted == 0


def test_faults_on_purpose_are_put_back() -> None:
    report = execute(inject="map:3,unmap:7,attribute:11,free:5")
    assert report.injected == {"map": 1, "unmap": 1, "attribute": 1, "free": 1}
    assert report.exit_code == 0
    assert report.verifier.clean
    assert report.not_freed_bytes == 0


def test_a_short_unmap_poisons_and_stops_the_guest() -> None:
    report = execute(inject="unmap:short:20")
    assert report.poisoned
    assert report.exit_code == 1
    assert report.verifier.clean, "fail closed: in doubt, but never stale"
    assert [target for _, _, target in report.in_doubt] == ["iommu0"]
    assert report.tally.requests < 1500


def test_a_guest_that_fragments_only_hurts_itself() -> None:
    report = execute(devices=Devices(max_mappings=64), workload="fragmenter")
    assert report.exit_code == 0
    assert any("budget" in reason for reason in report.tally.reasons)
    assert report.peak_entries <= 2 * 64


def test_a_trace_holds_everything_and_can_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    first = execute(trace=path)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(events) == first.trace_events
    times = [event["t"] for event in events]
    assert times == sorted(times)
    kinds = {event["event"] for event in events}
    assert kinds == {
        "start",
        "conversion",
        "state_change",
        "attributes",
        "map",
        "unmap",
        "free",
        "fault",
        "detach",
    }
    assert sum(event["event"] == "conversion" for event in events) == first.tally.requests
    again = execute(workload=str(path))
    assert again.state_hash == first.state_hash
    assert again.tally.outcomes == first.tally.outcomes
    assert again.exit_code == 0


def test_a_broken_trace_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(TraceError) as caught:
        execute(workload=str(path))
    assert (caught.value.path, caught.value.line) == (str(path), 1)


# -- scenarios ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not _EXAMPLES.is_dir(), reason="the examples are not beside the tests (wheel test)"
)
def test_examples_can_be_read() -> None:
    files = sorted(_EXAMPLES.glob("*.toml"))
    assert len(files) == 4
    for file in files:
        scenario = load_scenario(file)
        assert scenario.run.workload in workload_names()
        FaultPlan.parse(scenario.run.inject)


@pytest.mark.parametrize("name", workload_names())
def test_workloads_say_what_they_are_and_where_it_comes_from(name: str) -> None:
    workload = load_workload(name)
    assert workload.description
    assert workload.source


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[guest]\nmemory = "4Q"', ("guest.memory", "4Q", "expected a size")),
        ("[guest]\nmemory = 4097", ("guest.memory", "4097")),
        ('[guest]\nmemory = "4M"', ("guest.memory", "at least 64 MiB")),
        ("[guest]\nmemoryy = 1", ("memoryy", "memory, bios")),
        ('[devices]\npolicy = "best"', ("devices.policy", "best", "auto or page or run")),
        ("[devices]\ncount = -1", ("devices.count",)),
        ("[devices]\nmax_mappings = 0", ("devices.max_mappings",)),
        ('[run]\nseed = "one"', ("run.seed", "int")),
        ("[nonsense]\n", ("nonsense", "guest, devices, run")),
        ("[guest\n", ("not TOML",)),
    ],
)
def test_a_bad_scenario_names_file_key_and_what_was_expected(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_scenario(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text", ["map", "map:0", "map:-1", "unmap:long:3", "free:x", "map:3;free:1"]
)
def test_a_bad_fault_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a fault"):
        FaultPlan.parse(text)


# -- the guest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "pool"),
    [
        (256 * MIB, 64 * MIB),
        (GIB, 64 * MIB),
        (4 * GIB, 244 * MIB),
        (17 * GIB, GIB),
        (1024 * GIB, GIB),
    ],
)
def test_the_bounce_buffer_pool_is_six_percent_clamped(memory: int, pool: int) -> None:
    assert swiotlb_size(memory) == pool


def test_the_default_guest_lies_where_it_should() -> None:
    low, bios, high0, high1 = plan_layout(4 * GIB, 4 * MIB)
    assert (low.gpa, low.size) == (0, 2 * GIB)
    assert (bios.end, bios.size, bios.confidential) == (4 * GIB, 4 * MIB, False)
    assert (high0.gpa, high1.gpa, high1.end) == (4 * GIB, high0.end, 6 * GIB)


def test_the_script_is_hostile_in_every_way() -> None:
    script = GuestScript(load_workload("fragmenter"), plan_layout(GIB, 4 * MIB), 1, seed=3)
    requests: list[Request] = []
    for request in script.steady():
        requests.append(request)
        script.done(request, converted=False)
        if len(requests) == 3000:
            break
    hostile = [request for request in requests if request.action is Action.HOSTILE]
    border = plan_layout(GIB, 4 * MIB)[3].gpa
    assert any(request.gpa % PAGE_SIZE for request in hostile)
    assert any(request.gpa < 0 for request in hostile)
    assert any(request.gpa + request.size > 1 << 64 for request in hostile)
    assert any(request.gpa < border < request.gpa + request.size for request in hostile)
    assert any(request.gpa < 512 * MIB < request.gpa + request.size for request in hostile)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_report_for_machines() -> None:
    done = command("run", "--memory", "256M", "--conversions", "300", "--json", "-q")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["conversions"]["requests"] == 300
    assert report["violations"]["count"] == 0
    assert done.stderr == ""


def test_the_command_prints_a_report_for_people() -> None:
    job = ("run", "--memory", "256M", "--conversions", "300")
    done = command(*job)
    assert done.returncode == 0, done.stderr
    assert "0 violations" in done.stdout
    assert "one per page" in done.stdout
    assert "\x1b" not in done.stdout, "no colour where nobody sees it"
    shown = on_terminal(*job, columns=80)
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_the_command_without_coordination_names_ranges_and_fails() -> None:
    done = command("run", "--memory", "256M", "--conversions", "600", "--uncoordinated")
    assert done.returncode == 1
    assert "stale mapping" in done.stdout
    assert "[0x0, 0x8000000)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--memory", "1x"), "'1x' is not a size"),
        (("--policy", "best"), "choose from"),
        (("--inject", "bang:1"), "'bang:1' is not a fault"),
        (("--workload", "nope"), "firmware, fragmenter, linux"),
        (("--devices", "99"), "expected 0 to 64"),
        (("--max-mappings", "0"), "'0' is not a positive number"),
        (("/no/such/scenario.toml",), "/no/such/scenario.toml"),
        (("--trace", "/no/such/folder/trace"), "/no/such/folder/trace"),
    ],
)
def test_the_command_refuses_bad_options(arguments: tuple[str, ...], part: str) -> None:
    done = command("run", *arguments)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert done.stdout == ""


def test_a_full_disk_loses_the_trace_and_not_the_run() -> None:
    done = command("run", "--memory", "256M", "--conversions", "300", "-q", "--trace", "/dev/full")
    assert done.returncode == 1
    assert "0 violations" in done.stdout
    assert "the trace is incomplete" in done.stderr
    assert "No space left" in done.stderr


def test_control_c_ends_with_the_summary_so_far(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    arguments = [
        "run",
        "--memory",
        "256M",
        "--conversions",
        "10000000",
        "-q",
        "--json",
        "--trace",
        str(trace),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "ramblock", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (trace.exists() and trace.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    report = json.loads(output)
    assert report["interrupted"]
    assert report["conversions"]["requests"] > 0
    assert report["violations"]["count"] == 0
    lines = trace.read_bytes().splitlines()
    assert len(lines) == report["trace"]["events"]
    json.loads(lines[-1])


def test_the_module_is_the_command() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert "run a confidential guest under devices" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "conversion", "gpa": 0, "size": 4096, "to": "shared", "action": "dance"}',
        '{"event": "conversion", "gpa": "zero", "size": 4096, "to": "shared"}',
        '{"event": "conversion", "gpa": 0, "size": 4096, "to": "both"}',
        '{"event": "conversion", "gpa": 0',
        "\x00",
    ],
)
def test_a_hostile_trace_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    execute(trace=path, conversions=5)
    lines = path.read_text().splitlines()[:1]
    path.write_text("\n".join([*lines, line]) + "\n")
    done = command("run", "--workload", str(path), "-q")
    assert done.returncode == 3, done.stderr
    assert f"{path}:2:" in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -4096),
        ("size", 1 << 50),
        ("size", 5),
        ("gpa", -4096),
        ("name", "a\x00b"),
        ("name", ""),
    ],
)
def test_a_trace_cannot_describe_a_guest_that_cannot_be(
    tmp_path: Path, key: str, value: object
) -> None:
    path = tmp_path / "trace.jsonl"
    execute(trace=path, conversions=5)
    start = json.loads(path.read_text().splitlines()[0])
    start["blocks"][0][key] = value
    path.write_text(json.dumps(start) + "\n")
    with pytest.raises(TraceError) as caught:
        execute(workload=str(path))
    assert caught.value.line == 1
