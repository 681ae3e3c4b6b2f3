"""The double itself: bad input, its channels, its faults, and what is left when it ends."""

import errno
from pathlib import Path

import pytest

from lab.double import locate
from lab.qemu_double import (
    GIB,
    KIB,
    MIB,
    Call,
    Double,
    GuestOptions,
    GuestStopped,
    QemuEnded,
    Way,
)
from lab.qemu_double.orders import Order
from lab.qemu_double.pci import find_device
from lab.qemu_double.qmp import QmpError


def test_firmware_carries_out_each_order(double: Double) -> None:
    guest = double.guest()
    ask = guest.firmware.ask
    top = (1 << 64) - 1

    for number in (0, 1, 0xFF, 0x100, 1 << 63, top):
        assert ask(Order.PING, number) == number
    for width in (1, 2, 4, 8):
        guest.write(2 * MIB, top)
        guest.write(2 * MIB, 0, width)
        assert guest.read(2 * MIB) == top & ~((1 << 8 * width) - 1)
        guest.write(2 * MIB, 0x0123_4567_89AB_CDEF, width)
    assert guest.read(2 * MIB) == 0x0123_4567_89AB_CDEF
    assert guest.read(2 * MIB, 4) == 0x89AB_CDEF
    guest.fill_pages(4 * MIB, 64 * KIB, 1)
    guest.write(4 * MIB + 8 * KIB, 0)
    assert guest.count_filled(4 * MIB, 64 * KIB, 1) == 15
    assert guest.count_zero(4 * MIB, 128 * KIB) == 17
    # The scratch register of a second serial port that is not there, and of the one that is.
    assert guest.port_in(0x2FF, 1) == 0xFF
    guest.port_out(0x3FF, 0x5A, 1)
    assert guest.port_in(0x3FF, 1) == 0x5A


def test_unknown_order_is_answered(double: Double) -> None:
    guest = double.guest()
    guest.firmware._line.sendall(b"?" + bytes(4))

    assert guest.firmware._receive(10) == b"\xff" * 8
    assert guest.firmware.ask(Order.PING, 7) == 7


def test_answer_that_does_not_come_is_an_error(double: Double) -> None:
    guest = double.guest()
    guest.qmp.execute("stop")

    with pytest.raises(TimeoutError, match=r"not answered within 0\.3 s"):
        guest.firmware.ask(Order.PING, 1, timeout=0.3)
    guest.qmp.execute("cont")
    assert guest.firmware._receive(10) == (1).to_bytes(8, "little")


def test_machine_that_qemu_refuses_is_told_with_its_words(double: Double) -> None:
    with pytest.raises(QemuEnded, match="no-such-option") as caught:
        double.guest(GuestOptions(more=("-no-such-option",)))

    assert caught.value.status == 1


def test_qemu_that_dies_is_told_while_an_answer_is_awaited(double: Double) -> None:
    guest = double.guest()
    guest.qmp.execute("stop")
    guest.process.kill()

    with pytest.raises(QemuEnded, match="QEMU ended with -9"):
        guest.firmware.ask(Order.PING)
    assert guest.end() == -9


def test_guest_that_is_lost_to_a_triple_fault_says_so(double: Double) -> None:
    guest = double.guest()
    guest.convert(2 * MIB, 4 * KIB, private=False)

    with pytest.raises(QemuEnded) as caught:
        guest.read(16 * GIB)  # the firmware maps 8 GiB, and has no handler for a page fault
    error = caught.value
    assert (error.status, error.reason, error.triple_fault) == (0, "guest-reset", True)
    for part in (
        "QEMU ended with 0, guest-reset",
        "order: DOORBELL 0xc 0x200000 0x1 0x0 -> 0x0",
        "order: READ 0x400000000 0x8 0x0 0x0",
        "triple fault",
        "kvm_convert_memory start 0x200000 size 0x1000",
    ):
        assert part in str(error)


def test_reset_that_the_guest_asked_for_is_no_triple_fault(double: Double) -> None:
    guest = double.guest()

    with pytest.raises(QemuEnded) as caught:
        guest.port_out(0xCF9, 6, 1)  # the reset register of the PC's chipsets
    error = caught.value
    assert (error.status, error.reason, error.triple_fault) == (0, "guest-reset", False)


def test_refused_command_names_itself_and_the_reason(double: Double) -> None:
    guest = double.guest()

    with pytest.raises(QmpError, match="QEMU refused no-such-command: ") as caught:
        guest.qmp.execute("no-such-command")
    assert caught.value.command == "no-such-command"
    assert guest.status == "running"


def test_reset_of_a_guest_that_ends_by_it_is_refused(double: Double) -> None:
    guest = double.guest()

    with pytest.raises(ValueError, match="resets=True"):
        guest.reset()


def test_device_that_is_not_there_is_named(double: Double) -> None:
    guest = double.guest()

    with pytest.raises(LookupError, match="no PCI device 1af4:1058"):
        find_device(guest, 0x1AF4, 0x1058)


@pytest.mark.parametrize("call", [Call.TO_SHARED, Call.TO_PRIVATE])
def test_attribute_call_that_was_told_to_fails_and_the_others_do_not(
    double: Double, call: Call
) -> None:
    guest = double.guest()
    private = call is Call.TO_PRIVATE
    before = guest.faults.tally(call)
    guest.faults.arm(call, skip=2, error=errno.EBUSY)
    for _ in range(2):
        assert guest.convert(2 * MIB, 4 * KIB, private=private) == 0
        assert guest.convert(2 * MIB, 4 * KIB, private=not private) == 0
    with pytest.raises(GuestStopped):
        guest.convert(2 * MIB, 4 * KIB, private=private)

    after = guest.faults.tally(call)
    assert (after.calls - before.calls, after.failed - before.failed) == (3, 1)


def test_another_qemu_gets_the_library_as_any_program_would(tmp_path: Path) -> None:
    ours = locate()
    other = tmp_path / "other-qemu"
    other.write_text(f'#!/bin/sh\nexec "{ours.qemu}" "$@"\n')
    other.chmod(0o755)
    with Double(Way.PRETEND, locate(other)) as double:
        guest = double.guest()

        assert guest.convert(2 * MIB, 4 * KIB, private=False) == 0
        assert "create_vm of type 0" in guest.shim_log.read_text()


def test_everything_ends_with_the_double() -> None:
    with Double(Way.PRETEND) as double:
        device = double.vfio_user_device()
        guest = double.guest(GuestOptions(), device)
        process, folder = guest.process, double.folder
        assert Path(f"/proc/{process.pid}").exists()

    assert process.returncode == 0
    assert not device.probe.serving
    assert not folder.exists()


def test_stopped_guest_ends_too(double: Double) -> None:
    guest = double.guest()
    guest.qmp.execute("stop")

    assert guest.end() == 0
    assert guest.end() == 0  # and once more
