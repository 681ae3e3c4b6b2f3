# SPDX-License-Identifier: Apache-2.0
"""A confidential guest in an unchanged QEMU, from its start to its end."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from lab.double import Programs
from lab.qemu_double.faults import Faults
from lab.qemu_double.log import TRACED, QemuLog
from lab.qemu_double.options import GuestOptions
from lab.qemu_double.orders import Firmware, Order
from lab.qemu_double.qmp import Qmp, QmpError

__all__ = ["ConfidentialGuest", "Device", "GuestStopped", "QemuEnded", "Region", "Way"]

_PAGE = 4096
# KVM_HC_MAP_GPA_RANGE (include/uapi/linux/kvm_para.h, Documentation/virt/kvm/x86/hypercalls.rst).
_MAP_GPA_RANGE = 12
_ENCRYPTED = 1 << 4
_START_SECONDS = 120.0
_END_SECONDS = 20.0
_POLL_SECONDS = 0.05
# Of each log, in the message about a QEMU that is gone.
_HISTORY_LINES = 6


class Way(Enum):
    """How much of the kernel's side is real."""

    PRETEND = "pretend"
    """Any KVM: the attributes are taken and forgotten."""
    REAL = "real"
    """A KVM with software-protected VMs, such as the lab's: private memory is private."""


class QemuEnded(Exception):
    """
    QEMU is gone.

    :ivar status: Its exit code; negative: the signal that ended it.
    :ivar output: Its standard output and error.
    :ivar reason: Why, in QMP's words: ``guest-reset`` and others; None: it did not say.
    :ivar triple_fault: Whether KVM said that a vCPU had one. QEMU takes that for a reset, and says
        nothing of it.
    """

    def __init__(
        self, status: int, output: str, *, reason: str | None = None, history: Sequence[str] = ()
    ) -> None:
        why = f", {reason}" if reason else ""
        text = f"QEMU ended with {status}{why}: {output.strip() or 'it said nothing'}"
        super().__init__("\n".join((text, *history)))
        self.status = status
        self.output = output
        self.reason = reason
        self.triple_fault = any("triple fault" in line for line in history)


class GuestStopped(Exception):
    """
    QEMU stopped the guest in the middle of an order, which will never be answered.

    :ivar status: QEMU's word for it, ``internal-error`` for instance.
    """

    def __init__(self, status: str) -> None:
        super().__init__(f"QEMU stopped the guest: {status}")
        self.status = status


class Region(NamedTuple):
    """A part of a RAM block or ROM, where the guest sees it."""

    start: int
    end: int
    name: str
    """QEMU's name for the block's memory region."""
    offset: int
    """Of the start, in the block."""


class Device(Protocol):
    """What a guest can have assigned."""

    def objects(self) -> list[str]:
        """Return the objects of QEMU that the device needs; several devices may name the same."""

    def properties(self) -> dict[str, object]:
        """Return the device as QEMU's -device and device_add take it."""


class ConfidentialGuest:
    """
    One guest, from the start of QEMU to its end.

    :param folder: For sockets and logs: a short path, which a socket can have.
    :param devices: Assigned from the start.
    :raises QemuEnded: QEMU does not take the machine.
    """

    def __init__(
        self,
        programs: Programs,
        way: Way,
        options: GuestOptions,
        folder: Path,
        devices: Iterable[Device] = (),
    ) -> None:
        self.way = way
        self.options = options
        self.log = QemuLog(folder / "qemu.log")
        self.shim_log = folder / "shim.log"
        self.faults = Faults(folder / "faults")
        self._output = folder / "qemu.out"
        self._opened = False
        self._call = Order.VMMCALL if way is Way.REAL else Order.DOORBELL
        devices = list(devices)
        objects = dict.fromkeys(value for device in devices for value in device.objects())
        self._command = [
            *programs.command(),
            *options.arguments(programs.firmware),
            *(word for value in objects for word in ("-object", value)),
            *(word for device in devices for word in ("-device", json.dumps(device.properties()))),
            *self._channels(folder),
        ]
        environment = os.environ | programs.environment()
        environment |= {
            "RAMBLOCK_SHIM_PRETEND": "1" if way is Way.PRETEND else "0",
            "RAMBLOCK_SHIM_FAULTS": str(self.faults.path),
            "RAMBLOCK_SHIM_LOG": str(self.shim_log),
        }
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        with ExitStack() as stack:
            stack.callback(self._kill)
            try:
                self._open(folder, stack)
            except ConnectionError:
                self._wait_for_end()
                self._check_alive()
                raise
            stack.pop_all()

    def _open(self, folder: Path, stack: ExitStack) -> None:
        firmware_line = stack.enter_context(self._connect(folder / "com1"))
        qmp_line = stack.enter_context(self._connect(folder / "qmp"))
        self.qmp = Qmp(qmp_line)
        self.firmware = Firmware(firmware_line, self._check_running)
        self._opened = True
        # QEMU was started with -S: COM1 has to be connected before the firmware writes to it.
        self.qmp.execute("cont")
        self.firmware.wait_ready(_START_SECONDS)

    def _channels(self, folder: Path) -> list[str]:
        return [
            "-S",
            *("-chardev", f"socket,id=com1,path={folder}/com1,server=on,wait=off"),
            *("-serial", "chardev:com1"),
            *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
            *(self.options.tracing or self._tracing(folder)),
        ]

    def _tracing(self, folder: Path) -> list[str]:
        events = folder / "events"
        events.write_text("".join(f"{name}\n" for name in TRACED))
        return ["-msg", "timestamp=on", "-trace", f"events={events}", "-D", str(self.log.path)]

    # -- the guest's orders

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """
        Have the guest ask for a conversion of ``[gpa, gpa + size)``.

        :return: The hypercall's answer as the guest sees it: 0, or a negative error number.
        :raises GuestStopped: QEMU stopped the guest instead of answering.
        :raises QemuEnded: QEMU is gone.
        """
        attributes = _ENCRYPTED if private else 0
        answer = self.firmware.ask(self._call, _MAP_GPA_RANGE, gpa, size // _PAGE, attributes)
        return answer - (1 << 64) if answer >> 63 else answer

    def read(self, address: int, width: int = 8) -> int:
        """Read 4 or 8 bytes of the guest's memory or of a device, as the guest."""
        return self.firmware.ask(Order.READ, address, width)

    def write(self, address: int, value: int, width: int = 8) -> None:
        """Write 1, 2, 4 or 8 bytes, as the guest."""
        self.firmware.ask(Order.WRITE, address, width, value)

    def fill_pages(self, gpa: int, size: int, salt: int) -> None:
        """Write to the first word of each page of a range its own address and *salt*."""
        self.firmware.ask(Order.FILL_PAGES, gpa, size // _PAGE, salt)

    def count_filled(self, gpa: int, size: int, salt: int) -> int:
        """Count the pages of a range that still hold what ``fill_pages`` wrote."""
        return self.firmware.ask(Order.COUNT_FILLED, gpa, size // _PAGE, salt)

    def count_zero(self, gpa: int, size: int) -> int:
        """Count the pages of a range whose first word is zero."""
        return self.firmware.ask(Order.COUNT_ZERO, gpa, size // _PAGE)

    def port_in(self, port: int, width: int = 4) -> int:
        """Read an I/O port."""
        return self.firmware.ask(Order.PORT_IN, port, width)

    def port_out(self, port: int, value: int, width: int = 4) -> None:
        """Write to an I/O port."""
        self.firmware.ask(Order.PORT_OUT, port, width, value)

    # -- the machine

    @property
    def status(self) -> str:
        """QEMU's word for how the guest is: ``running``, ``internal-error`` and others."""
        status: str = self.qmp.execute("query-status")["status"]
        return status

    def reset(self) -> None:
        """Reset the guest, and wait until its firmware has started again."""
        if not self.options.resets:
            raise ValueError("this guest ends at a reset; give GuestOptions(resets=True)")
        self.qmp.execute("system_reset")
        self.firmware.wait_ready(_START_SECONDS)

    def plug(self, device: Device, name: str, slot: int = 0) -> None:
        """
        Add a device behind the root port *slot*.

        :raises QmpError: QEMU did not take it.
        """
        self.qmp.execute("device_add", id=name, bus=f"slot{slot}", **device.properties())

    def unplug(self, name: str) -> None:
        """
        Take a device away: QEMU asks the guest, and the guest agrees.

        :raises TimeoutError: QEMU does not say that it is gone.
        """
        self.qmp.execute("device_del", id=name)
        # ACPI's PCI hot-plug (docs/specs/acpi_pci_hotplug.rst): select a bus, read what is to go,
        # eject it. It is at 0xcc0 on q35.
        selector, going, eject = 0xCD0, 0xCC4, 0xCC8
        for bus in range(self.options.root_ports + 1):
            self.port_out(selector, bus)
            if (slots := self.port_in(going)) not in (0, 0xFFFF_FFFF):
                self.port_out(eject, slots)
        while self.qmp.wait_event("DEVICE_DELETED")["data"].get("device") != name:
            pass

    def memory_regions(self) -> list[Region]:
        """Return the RAM and ROM that the guest sees, from QEMU's flat view, ascending."""
        # One view for each address space; that of memory is the one whose regions KVM has.
        pattern = re.compile(
            r" *([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, (?:ram|rom)\): "
            r"(\S+)(?: @([0-9a-f]{16}))?.* KVM"
        )
        return [
            Region(int(match[1], 16), int(match[2], 16) + 1, match[3], int(match[4] or "0", 16))
            for line in self.qmp.human("info mtree -f").splitlines()
            if (match := pattern.fullmatch(line))
        ]

    def output(self) -> str:
        """Return what QEMU has printed so far."""
        return self._output.read_text(errors="replace")

    # -- the end

    def end(self) -> int:
        """
        End QEMU; return its exit code. The second time nothing happens.

        A guest that was stopped, or a QEMU that hangs, ends too.
        """
        if self.process.poll() is None:
            with suppress(ConnectionError, TimeoutError, QmpError):
                self.qmp.execute("quit")
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        self.qmp.close()
        self.firmware.close()
        return self.process.returncode

    def __enter__(self) -> ConfidentialGuest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
        self.faults.close()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                line.connect(str(path))
            except OSError:
                line.close()
                self._check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return line

    def _wait_for_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)

    def _check_alive(self) -> None:
        if (status := self.process.poll()) is not None:
            raise QemuEnded(status, self.output(), reason=self._reason(), history=self._history())

    def _reason(self) -> str | None:
        events = self.qmp.remaining_events() if self._opened else []
        reasons = [event["data"]["reason"] for event in events if event["event"] == "SHUTDOWN"]
        return reasons[-1] if reasons else None

    def _history(self) -> list[str]:
        """Return the end of what was asked and done, for a message."""
        lines = [f"order: {order}" for order in self.firmware.history] if self._opened else []
        for name, path in (("shim", self.shim_log), ("trace", self.log.path)):
            text = path.read_text(errors="replace") if path.exists() else ""
            lines += [f"{name}: {line}" for line in text.splitlines()[-_HISTORY_LINES:]]
        return lines

    def _check_running(self) -> None:
        self._check_alive()
        try:
            status = self.status
        except ConnectionError:
            # Its monitor is closed a moment before the process is gone.
            self._wait_for_end()
            self._check_alive()
            raise
        if status in ("internal-error", "guest-panicked", "io-error", "shutdown"):
            raise GuestStopped(status)
