"""The QEMU double's parts that need no QEMU, among them the command."""

import errno
import itertools
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli, double
from lab.cache import Cache
from lab.errors import LabError
from lab.qemu_double import Call, GuestOptions, QemuLog, Way
from lab.qemu_double.double import way_from_environment
from lab.qemu_double.faults import Faults
from lab.qemu_double.options import GIB, MIB, Technology
from lab.qemu_double.orders import READY, Firmware, Order
from lab.qemu_double.qmp import Qmp, QmpError

_FIRMWARE = Path("/firmware.bin")


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _values(arguments: list[str], option: str) -> list[str]:
    return [b for a, b in itertools.pairwise(arguments) if a == option]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 5000}, "0x1388 bytes of memory"),
        ({"memory": 64 * MIB, "nodes": (32 * MIB, 16 * MIB)}, "the nodes have 0x3000000 bytes"),
        ({"virtio_mem": -4096}, "expected a multiple of 4 KiB"),
        ({"technology": Technology.TDX, "resets": True}, "cannot be reset"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GuestOptions(**options)  # type: ignore[arg-type]


def test_one_backend_is_the_machines_own() -> None:
    arguments = GuestOptions(memory=64 * MIB).arguments(_FIRMWARE)

    assert _values(arguments, "-m") == ["65536K"]
    assert [b for b in _values(arguments, "-object") if "memory" in b] == [
        "memory-backend-memfd,id=ram,size=67108864,share=on"
    ]
    assert _values(arguments, "-machine")[0].endswith(",memory-backend=ram")
    assert "-no-reboot" in arguments


def test_each_node_has_a_backend_and_there_is_room_to_plug() -> None:
    options = GuestOptions(
        nodes=(32 * MIB, 32 * MIB), virtio_mem=2 * GIB, resets=True, root_ports=2
    )
    arguments = options.arguments(_FIRMWARE)

    assert _values(arguments, "-m") == ["65536K,maxmem=4G,slots=2"]
    assert _values(arguments, "-numa") == ["node,memdev=node0", "node,memdev=node1"]
    assert "memory-backend" not in _values(arguments, "-machine")[0]
    assert [d.split(",")[0] for d in _values(arguments, "-device")] == [
        "virtio-mem-pci",
        "pcie-root-port",
        "pcie-root-port",
    ]
    assert "-no-reboot" not in arguments


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0,), "p 00 00 00 00"),
        ((0x1234, 1, 0, 0xFF), "p 023412 0101 00 01ff"),
        ((-1,), "p 08ffffffffffffffff 00 00 00"),
        ((1 << 64,), "p 00 00 00 00"),
    ],
)
def test_numbers_of_an_order_have_as_many_bytes_as_they_need(
    line: tuple[socket.socket, socket.socket], numbers: tuple[int, ...], expected: str
) -> None:
    ours, theirs = line
    theirs.sendall(struct.pack("<Q", 7))
    assert Firmware(ours, lambda: None).ask(Order.PING, *numbers) == 7

    assert theirs.recv(100) == b"p" + bytes.fromhex(expected.removeprefix("p"))


def test_firmware_that_starts_with_something_else_is_told(
    line: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = line
    theirs.sendall(READY + b"SeaBIOS ")
    firmware = Firmware(ours, lambda: None)
    firmware.wait_ready(1)

    with pytest.raises(ValueError, match="starts with b'SeaBIOS '"):
        firmware.wait_ready(1)
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        firmware.wait_ready(0.1)
    theirs.close()
    with pytest.raises(ConnectionError):
        firmware.wait_ready(1)


def _say(sock: socket.socket, *messages: dict[str, object]) -> None:
    sock.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def test_events_are_kept_until_somebody_wants_them(
    line: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = line
    empty: dict[str, object] = {}
    _say(theirs, {"QMP": empty}, {"return": empty})
    qmp = Qmp(ours, timeout=1)
    _say(theirs, {"event": "A"}, {"event": "B"}, {"return": {"status": "running"}})

    assert qmp.execute("query-status") == {"status": "running"}
    assert qmp.wait_event("B", 1) == {"event": "B"}
    assert qmp.wait_event("A", 1) == {"event": "A"}
    with pytest.raises(TimeoutError):
        qmp.wait_event("A", 0.05)
    _say(theirs, {"error": {"class": "GenericError", "desc": "no such thing"}})
    with pytest.raises(QmpError, match="QEMU refused device_del: no such thing"):
        qmp.execute("device_del", id="x")
    theirs.close()
    with pytest.raises(ConnectionError):
        qmp.execute("quit")


def test_events_of_a_qemu_that_ends_are_read_to_the_last(
    line: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = line
    empty: dict[str, object] = {}
    _say(theirs, {"QMP": empty}, {"return": empty}, {"event": "RESUME"})
    qmp = Qmp(ours, timeout=1)
    _say(theirs, {"return": empty}, {"event": "SHUTDOWN", "data": {"reason": "guest-reset"}})
    theirs.close()

    assert [event["event"] for event in qmp.remaining_events()] == ["RESUME", "SHUTDOWN"]
    assert qmp.remaining_events() == []


def test_log_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = QemuLog(path)
    assert log.new() == []
    path.write_text(
        "2026-11-27T15:01:53.994712Z kvm_sev_init \n"
        "2026-11-27T15:01:54Z a_whole_second a 0x10 b 0x20\n"  # GLib leaves a fraction of zero out
        "2026-11-27T15:01:54.000001Z qemu-system-x86_64: warning: no event\n"
        "2026-11-27T15:01:54.000002Z half"
    )

    first, second = log.new()
    assert (first.number, str(first)) == (1, "kvm_sev_init")
    assert (second.number, second.name, second.numbers()) == (2, "a_whole_second", (0x10, 0x20))
    with path.open("a") as file:
        file.write("_a_line\n")
    assert [str(each) for each in log.new()] == ["half_a_line"]
    assert log.new() == []


def test_fault_is_in_the_file_where_qemu_looks(tmp_path: Path) -> None:
    faults = Faults(tmp_path / "faults")
    faults.arm(Call.UNMAP, skip=3, count=2, error=errno.EIO)
    data = bytearray(faults.path.read_bytes())

    assert struct.unpack_from("=5I", data, 20 * Call.UNMAP) == (3, 2, errno.EIO, 0, 0)
    assert len(data) == 20 * len(Call)
    struct.pack_into("=2I", data, 20 * Call.UNMAP + 12, 5, 2)
    faults.path.write_bytes(data)
    assert faults.tally(Call.UNMAP) == (5, 2)
    for wrong in ({"skip": -1}, {"count": -1}, {"error": 0}):
        with pytest.raises(ValueError, match="expected 0 or more, and an errno"):
            faults.arm(Call.MAP, **wrong)
    faults.close()


def test_fault_numbers_are_those_of_the_shim() -> None:
    header = (Path(double.__file__).parent / "qemu_double/shim/shim.h").read_text()
    names = header.partition("enum fault {")[2].partition("}")[0].replace(",", " ").split()

    assert names == [*(f"FAULT_{call.name}" for call in Call), "FAULTS"]


def test_way_is_that_of_the_place_unless_somebody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAMBLOCK_DOUBLE_WAY", raising=False)
    monkeypatch.setenv("RAMBLOCK_LAB", "1")
    assert way_from_environment() is Way.REAL
    monkeypatch.setenv("RAMBLOCK_DOUBLE_WAY", "pretend")
    assert way_from_environment() is Way.PRETEND
    monkeypatch.setenv("RAMBLOCK_DOUBLE_WAY", "perhaps")
    with pytest.raises(ValueError, match="perhaps"):
        way_from_environment()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (double.DOUBLE_VARIABLE, double.QEMU_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return Cache()


def test_what_is_not_built_is_named(empty_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"the lab's QEMU is not in the cache; run: make lab"):
        double.locate()
    with pytest.raises(LabError, match="the QEMU double is not built"):
        double.locate(Path("/usr/bin/qemu"))
    monkeypatch.setenv(double.DOUBLE_VARIABLE, "/double")
    programs = double.locate(Path("/usr/bin/qemu"))
    # Somebody's own QEMU is started as it is, and gets the library as any program would.
    assert programs.command() == ["/usr/bin/qemu"]
    assert programs.environment() == {"LD_PRELOAD": "/double/shim.so"}
    assert not empty_cache.root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.py"], "no such script: no-such.py"),
        (["--kernel", __file__, "--", __file__], "--kernel is for --real"),
    ],
)
def test_command_says_what_it_cannot_run(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["qemu", *arguments]) == 125
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("empty_cache")
def test_dry_run_builds_no_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["qemu", "--dry-run", "--", __file__, "argument"]) == 0
    printed = capsys.readouterr().out

    assert "shim.so" in printed
    assert "linux-source" not in printed
    assert printed.splitlines()[-1].endswith(f"{__file__} argument")
