"""
What comes of one run of the lab's VM, with a program in the place of virtme-ng that plays the VM.
"""

import re
import sys
from pathlib import Path

import pytest

from lab import guest, vm
from lab.console import KernelWatch, Lines
from lab.errors import LostVmError
from lab.variants import VARIANTS, Variant
from lab.vm import Machine, Result, Work

_PRELUDE = """
import pathlib, sys, time
options = sys.argv[sys.argv.index("--qemu-opts"):]
option = next(o for o in options if o.startswith("local,id=exchange,path="))
exchange = pathlib.Path(option.split("path=")[1].split(",")[0])
def status(text):
    with (exchange / "status").open("a") as file: file.write(text)
def output(text):
    with (exchange / "output").open("a") as file: file.write(text)
print("[    0.000000] Linux", flush=True)
"""


def _machine(tmp_path: Path, plays: str) -> Machine:
    return Machine(
        kernel=Path("/the/bzImage"),
        qemu=Path("/the/qemu"),
        launcher=[sys.executable, "-c", _PRELUDE + plays],
        variant=VARIANTS["amd-iommu"],
        logs=tmp_path / "logs",
    )


def _run(machine: Machine, *, timeout: float = 60) -> tuple[Result, list[str]]:
    shown: list[str] = []
    work = Work(command="true", name="/bin/some thing", directory=Path("/"), timeout=timeout)
    return machine.run(work, show=shown.append), shown


def test_command_that_ended_has_its_exit_code_and_output(tmp_path: Path) -> None:
    plays = """
status("started\\n"); output("one\\ntwo"); print("[    1.0] console", flush=True)
status("exit 0\\n")
"""
    result, shown = _run(_machine(tmp_path, plays))

    assert result.status == 0
    assert shown == ["one", "two"]
    assert not result.broken
    assert not result.dubious


def test_command_that_failed_is_a_result_and_no_error_of_the_lab(tmp_path: Path) -> None:
    result, _ = _run(_machine(tmp_path, 'status("started\\nexit 7\\n")'))

    assert result.status == 7


@pytest.mark.parametrize(
    ("plays", "reason"),
    [
        ('print("no such device"); sys.exit(1)', "QEMU ended while it booted; .*: no such device"),
        ('status("started\\n")', "QEMU ended while the command ran"),
        # Died in the middle of the last word.
        ('status("started\\nexit 1")', "QEMU ended while the command ran"),
        ('status("started\\n"); time.sleep(600)', "the command was not done after 1 s"),
        (
            'status("started\\n"); print("[ 9.1] Kernel panic - not syncing: Fatal exception")',
            r"Kernel panic - not syncing: Fatal exception \(while the command ran\)",
        ),
    ],
)
def test_vm_that_ended_before_the_command_was_lost(tmp_path: Path, plays: str, reason: str) -> None:
    with pytest.raises(LostVmError, match=f"^the VM was lost: {reason}") as caught:
        _run(_machine(tmp_path, plays), timeout=1)

    assert caught.value.log.exists()
    assert "# lost: " in caught.value.log.read_text()


def test_vm_that_does_not_boot_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "_BOOT_TIMEOUT_S", 0.5)

    with pytest.raises(LostVmError, match="did not boot"):
        _run(_machine(tmp_path, "time.sleep(600)"))


def test_vm_that_does_not_power_off_is_ended_and_the_result_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "_POWER_OFF_TIMEOUT_S", 0.5)

    result, _ = _run(_machine(tmp_path, 'status("started\\nexit 4\\n"); time.sleep(600)'))

    assert result.status == 4


def test_broken_kernel_is_reported_beside_the_result(tmp_path: Path) -> None:
    plays = """
print("[    2.0] WARNING: drivers/iommu/iommu.c:12 at iommu_unmap+0x1/0x2")
print("[    2.1] BUG: kernel NULL pointer dereference, address: 0000000000000008")
status("started\\nexit 0\\n")
"""
    result, _ = _run(_machine(tmp_path, plays))

    assert result.status == 0
    assert [line.split(":")[0] for line in result.broken] == ["BUG"]
    assert [line.split(":")[0] for line in result.dubious] == ["WARNING"]


def test_log_has_command_console_and_output_under_a_readable_name(tmp_path: Path) -> None:
    result, _ = _run(_machine(tmp_path, 'output("said\\n"); status("started\\nexit 0\\n")'))

    text = result.log.read_text()
    assert re.fullmatch(r"[-\d]+-amd-iommu-bin-some-thing\.log", result.log.name)
    for part in (
        "# true\n",
        "--kimg /the/bzImage",
        "[    0.000000] Linux\n",
        "said\n",
        "# exit code 0\n",
    ):
        assert part in text
    assert [path.name for path in result.log.parent.iterdir()] == [result.log.name]


def test_report_can_be_collected_from_a_lost_vm(tmp_path: Path) -> None:
    machine = _machine(tmp_path, 'status("started\\n"); (exchange / "report").write_text("so far")')
    work = Work(command="true", name="x", directory=Path("/"), timeout=60)
    collected: list[str] = []

    with pytest.raises(LostVmError):
        machine.run(work, collect=lambda folder: collected.append((folder / "report").read_text()))

    assert collected == ["so far"]


def test_command_line_has_the_variant() -> None:
    machine = Machine(
        kernel=Path("/k"),
        qemu=Path("/q"),
        launcher=["virtme"],
        variant=VARIANTS["amd-iommu"],
        logs=Path("/logs"),
    )
    words = machine.command(Path("/a,b"))

    assert words[0] == "virtme"
    assert "amd-iommu,dma-remap=on" in words
    assert "iommufd.allow_unsafe_interrupts=1" in words
    assert words[words.index("--cpus") + 1] == "3"
    assert "--disable-kvm" in words
    assert "local,id=exchange,path=/a,,b,security_model=none" in words
    # What comes after it is QEMU's.
    assert words.index("--qemu-opts") > words.index("--script-sh")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_command_never_runs_on_the_first_of_several_processors(variant: Variant) -> None:
    first, last = map(int, variant.command_processors.split("-"))

    assert first == (0 if variant.vcpus == 1 else 1)
    assert (last, last - first + 1) == (variant.vcpus - 1, variant.processors)


def test_script_quotes_what_people_give() -> None:
    script = guest.script(
        "echo 'a b'; exit 3",
        processors="1-2",
        directory=Path("/with space"),
        places=[Path("/tmp/it's")],
        environment={"NAME": "a value"},
    )

    assert "cd '/with space'" in script
    assert "sh -c 'echo '\"'\"'a b'\"'\"'; exit 3'" in script
    assert "'NAME=a value'" in script
    assert "in '/tmp/it'\"'\"'s'; do" in script


@pytest.mark.parametrize(
    ("status", "started", "code"),
    [
        ("", False, None),
        ("start", False, None),
        ("started\n", True, None),
        ("started\nexi", True, None),
        ("started\nexit 1", True, None),
        ("started\nexit 12\n", True, 12),
        ("exit 0\n", False, None),
    ],
)
def test_status_is_believed_only_when_whole(status: str, started: bool, code: int | None) -> None:
    assert guest.started(status) == started
    assert guest.exit_status(status) == code


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("[   52.1] Oops: Oops: 0000 [#1] SMP", "broken"),
        ("[   52.1] kernel BUG at mm/gup.c:12!", "broken"),
        ("[   52.1] general protection fault, maybe for address 0x0: 0000", "broken"),
        ("[   52.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s!", "dubious"),
        ("[   52.1] rcu: INFO: rcu_preempt self-detected stall on CPU", "dubious"),
        ("[   52.1] DMAR: [DMA Write NO_PASID] Request device [00:09.0] fault addr", None),
        ("[   52.1] Warning: Processor Platform Limit event detected, but not handled.", None),
    ],
)
def test_kernel_watch_tells_trouble_from_talk(line: str, kind: str | None) -> None:
    watch = KernelWatch()
    watch.line(line)

    assert bool(watch.broken) == (kind == "broken")
    assert bool(watch.dubious) == (kind == "dubious")
    assert watch.last == line


def test_lines_come_whole_however_the_bytes_come(tmp_path: Path) -> None:
    data = "one\r\nzwölf\n\nrest".encode()
    for step in (1, 2, 3, len(data)):
        seen: list[str] = []
        with (tmp_path / "log").open("w+b") as log:
            lines = Lines(log, seen.append)
            for start in range(0, len(data), step):
                lines.feed(data[start : start + step])
            lines.end()
            log.seek(0)
            assert log.read().decode() == "one\nzwölf\n\nrest\n"
        assert seen == ["one", "zwölf", "", "rest"]
