"""A vCPU of the real kernel: registers, exits, answers, kicks, and its end."""

import errno
import gc
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from doubles import PAGE
from kvm_guests import (
    HALT,
    enter_flat_32bit,
    jump_back,
    load,
    move,
    read_port,
    run_through,
    store,
    write_code,
    write_port,
    written,
)
from ramblock import GuestMemory, RamBlock
from ramblock.errors import UsageError
from ramblock.kvm import (
    HaltExit,
    HypercallResult,
    InterruptedExit,
    IoExit,
    Kvm,
    KvmVm,
    MmioExit,
    ShutdownExit,
    Vcpu,
)
from ramblock.uapi import ioctl
from ramblock.uapi.kvm import KVM_RUN, ExitReason
from require import require_kvm

pytestmark = require_kvm

CODE, DATA = 0x1000, 0x3000
SIZE = 16 * PAGE
HOLE = 0x40_0000
ENDLESS = jump_back(0)


@pytest.fixture
def ram(vm: KvmVm) -> Iterator[RamBlock]:
    with RamBlock.create("ram", SIZE) as block:
        GuestMemory(vm).map(block, 0)
        yield block


@pytest.fixture
def vcpu(kvm: Kvm, vm: KvmVm, ram: RamBlock) -> Vcpu:
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid(kvm.supported_cpuid())
    enter_flat_32bit(vcpu, CODE)
    return vcpu


# -- exits and answers -----------------------------------------------------------------------------


def test_port_write_and_read(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(
        ram, CODE, move("eax", 0x1234_5678), write_port(0x10), read_port(0x11), store(DATA), HALT
    )
    data = bytes.fromhex("78563412")
    assert run_through(vcpu) == IoExit(port=0x10, size=4, count=1, write=True, data=data)
    assert run_through(vcpu) == IoExit(port=0x11, size=4, count=1, write=False, data=b"")
    vcpu.complete_io(b"ABCD")
    assert run_through(vcpu) == HaltExit()
    assert ram.read(DATA, 4) == b"ABCD"


def test_string_output_comes_in_one_piece(ram: RamBlock, vcpu: Vcpu) -> None:
    ram.write(DATA, b"hello")
    write_code(ram, CODE, move("ecx", 5), move("edx", 0x3F8), b"\xf3\x6e", HALT)  # rep outsb
    registers = vcpu.registers
    registers.rsi = DATA
    vcpu.registers = registers
    sent = b""
    while isinstance(exit := run_through(vcpu), IoExit):
        assert (exit.port, exit.size, exit.write) == (0x3F8, 1, True)
        assert len(exit.data) == exit.count
        sent += exit.data
    assert sent == b"hello"


def test_mmio_write_and_read(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, move("eax", 0xAABB_CCDD), store(HOLE), load(HOLE + 8), store(DATA), HALT)
    data = bytes.fromhex("ddccbbaa")
    assert run_through(vcpu) == MmioExit(gpa=HOLE, size=4, write=True, data=data)
    assert run_through(vcpu) == MmioExit(gpa=HOLE + 8, size=4, write=False, data=b"")
    vcpu.complete_io(b"wxyz")
    assert run_through(vcpu) == HaltExit()
    assert ram.read(DATA, 4) == b"wxyz"


def test_write_to_a_rom_comes_out(vm: KvmVm, ram: RamBlock, vcpu: Vcpu) -> None:
    with RamBlock.create("rom", PAGE) as rom:
        rom.write(0, b"ROM!")
        GuestMemory(vm).map(rom, HOLE, readonly=True)
        write_code(ram, CODE, load(HOLE), store(HOLE), store(DATA), HALT)
        assert run_through(vcpu) == MmioExit(gpa=HOLE, size=4, write=True, data=b"ROM!")
        assert run_through(vcpu) == HaltExit()
        assert ram.read(DATA, 4) == b"ROM!"


def test_read_that_nobody_answers_reads_as_ones(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(
        *(ram, CODE, move("eax", 0), write_port(0x10), read_port(0x11), store(DATA)),
        *(move("eax", 0), store(HOLE), load(HOLE), store(DATA + 4), HALT),
    )
    while not isinstance(run_through(vcpu), HaltExit):
        pass
    assert ram.read(DATA, 8) == b"\xff" * 8


@pytest.mark.parametrize("data", [b"", b"abc", b"abcde"])
def test_answer_of_another_size_is_refused(ram: RamBlock, vcpu: Vcpu, data: bytes) -> None:
    write_code(ram, CODE, read_port(0x11), HALT)
    run_through(vcpu)
    with pytest.raises(UsageError, match="expected 4 bytes"):
        vcpu.complete_io(data)


def test_only_what_was_asked_is_answered(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, write_port(0x10), HALT)
    with pytest.raises(UsageError, match="reads nothing"):
        vcpu.complete_io(b"abcd")
    run_through(vcpu)
    with pytest.raises(UsageError, match="it is a write"):
        vcpu.complete_io(b"abcd")
    with pytest.raises(UsageError, match="DONE: 0> is no answer to IoExit"):
        vcpu.set_hypercall_result(HypercallResult.DONE)


def test_triple_fault_is_a_shutdown(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, b"\x0f\x0b")  # ud2, and no interrupt table
    assert run_through(vcpu) == ShutdownExit()


def test_code_in_16_bits(ram: RamBlock, vm: KvmVm) -> None:
    # What a processor does after reset, but for where it begins: mov ax, 0x1234; out 0x10, ax; hlt
    ram.write(CODE, b"\xb8\x34\x12\xe7\x10\xf4")
    vcpu = vm.create_vcpu(1)
    special = vcpu.special_registers
    special.cs.base, special.cs.selector = 0, 0
    vcpu.special_registers = special
    registers = vcpu.registers
    registers.rip = CODE
    vcpu.registers = registers
    assert run_through(vcpu) == IoExit(port=0x10, size=2, count=1, write=True, data=b"\x34\x12")
    assert run_through(vcpu) == HaltExit()


def test_registers_are_a_copy(vcpu: Vcpu) -> None:
    registers = vcpu.registers
    registers.rbx = 0x0123_4567_89AB_CDEF
    assert vcpu.registers.rbx == 0
    vcpu.registers = registers
    assert vcpu.registers.rbx == 0x0123_4567_89AB_CDEF
    special = vcpu.special_registers
    special.cr2 = 0x1000
    vcpu.special_registers = special
    assert vcpu.special_registers.cr2 == 0x1000


def test_vcpu_that_cannot_be_made(vm: KvmVm, vcpu: Vcpu) -> None:
    with pytest.raises(OSError, match="vCPU 0") as caught:
        vm.create_vcpu(vcpu.id)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(OSError, match="vCPU 1000000"):
        vm.create_vcpu(1_000_000)


def refuse_to_run(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real = ioctl.call

    def call(fd: int, request: int, argument: int = 0) -> int:
        if request == KVM_RUN:
            raise OSError(error, "no")
        return real(fd, request, argument)

    monkeypatch.setattr(ioctl, "call", call)


def test_kvm_that_cannot_run_it_is_an_error(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_run(monkeypatch, errno.ENOEXEC)
    with pytest.raises(OSError, match="vCPU 0: KVM_RUN: Exec format error") as caught:
        vcpu.run()
    assert caught.value.errno == errno.ENOEXEC


def test_memory_fault_of_an_earlier_run_is_not_reported_again(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A KVM_RUN that fails with EFAULT for another reason may leave the exit reason as it was.
    vcpu._page._run.exit_reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    refuse_to_run(monkeypatch, errno.EFAULT)
    with pytest.raises(OSError, match="Bad address"):
        vcpu.run()


# -- kicks -----------------------------------------------------------------------------------------


def test_kick_while_nobody_runs_it_is_not_lost(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run() == InterruptedExit()
    # Both were one.
    write_code(ram, CODE, HALT)
    assert vcpu.run() == HaltExit()


def test_kick_from_another_thread(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    for delay in (0.0, 0.001, 0.05):
        timer = threading.Timer(delay, vcpu.kick)
        timer.start()
        assert vcpu.run() == InterruptedExit()
        timer.join()


def test_kick_of_a_vcpu_on_a_thread_of_its_own(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    exits = []
    thread = threading.Thread(target=lambda: exits.append(vcpu.run()))
    thread.start()
    time.sleep(0.02)  # so that it is in the guest, most of the time; the test holds without
    vcpu.kick()
    thread.join(30)
    assert exits == [InterruptedExit()]


def test_no_kick_is_lost_among_many(ram: RamBlock, vcpu: Vcpu) -> None:
    # Exits and kicks at once: a run that comes back for its own reason leaves the kick for the
    # next.
    write_code(ram, CODE, write_port(0x10), jump_back(2))
    count = 300
    kicked, seen = threading.Semaphore(0), threading.Semaphore(0)

    def kick() -> None:
        for _ in range(count):
            vcpu.kick()
            kicked.release()
            assert seen.acquire(timeout=30)

    thread = threading.Thread(target=kick)
    thread.start()
    interrupts = exits = 0
    while interrupts < count:
        if isinstance(vcpu.run(), InterruptedExit):
            if kicked.acquire(timeout=30):
                interrupts += 1
                seen.release()
        else:
            exits += 1
    thread.join()
    assert exits > 0


def test_kick_completes_what_is_pending(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, read_port(0x11), ENDLESS)
    run_through(vcpu)
    vcpu.complete_io(b"\x78\x56\x34\x12")
    vcpu.kick()
    assert vcpu.run() == InterruptedExit()
    assert vcpu.registers.rax == 0x1234_5678


def test_signal_interrupts_and_its_handler_runs(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        timer = threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.start()
        assert vcpu.run() == InterruptedExit()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]


def test_handler_may_kick(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    before = signal.signal(signal.SIGUSR1, lambda *_: vcpu.kick())
    try:
        timer = threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.start()
        assert vcpu.run() == InterruptedExit()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_leaves_the_guest(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    timer = threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vcpu.run()
    timer.join()
    write_code(ram, CODE, HALT)
    assert run_through(vcpu) == HaltExit()


def test_ctrl_c_at_any_moment_leaves_it_usable(ram: RamBlock, vcpu: Vcpu) -> None:
    """
    The guest reads a port and shows what it has read: the answer, or ones if Ctrl-C kept the exit
    from us.
    """
    write_code(
        ram, CODE, read := read_port(0x11), show := write_port(0x10), jump_back(len(read + show))
    )
    answer, stop, inside = 0x5A5A_5A5A, False, False
    main = threading.get_ident()

    def raise_inside(*_: object) -> None:
        if inside:
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not stop:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(random.random() / 5000)

    before = signal.signal(signal.SIGINT, raise_inside)
    thread = threading.Thread(target=interrupt)
    thread.start()
    shown: set[int] = set()
    interrupts = 0
    try:
        while interrupts < 300:
            exit = None
            try:
                inside = True
                exit = vcpu.run()
                inside = False
            except KeyboardInterrupt:
                inside = False
                interrupts += 1
            if isinstance(exit, IoExit) and exit.write:
                shown.add(written(exit))
            elif isinstance(exit, IoExit):
                vcpu.complete_io(answer.to_bytes(4, "little"))
    finally:
        stop = True
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert answer in shown
    assert shown <= {answer, 0xFFFF_FFFF}
    vcpu.kick()
    assert vcpu.run() == InterruptedExit()


def test_signals_that_the_thread_blocks_stay_blocked(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, HALT)
    exits = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        exits.append(vcpu.run())
        signal.sigtimedwait({signal.SIGUSR2}, 0)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert exits == [HaltExit()]


# -- the end ---------------------------------------------------------------------------------------


def test_closed_is_closed(vcpu: Vcpu) -> None:
    fd = vcpu.fd
    assert repr(vcpu) == "<Vcpu 0>"
    with vcpu:
        pass
    vcpu.close()
    assert repr(vcpu) == "<Vcpu 0, closed>"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(UsageError, match="vCPU 0 is closed"):
        vcpu.run()
    with pytest.raises(UsageError, match="vCPU 0 is closed"):
        _ = vcpu.registers
    vcpu.kick()


def test_close_takes_it_out_of_the_guest(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    ends: list[object] = []

    def run() -> None:
        try:
            while True:
                ends.append(vcpu.run())
        except UsageError as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.02)
    vcpu.close()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(ends[-1], UsageError)
    assert set(ends[:-1]) <= {InterruptedExit()}


def held() -> tuple[int, int]:
    """How many descriptors and mappings of KVM this process has."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    maps = Path("/proc/self/maps").read_text()
    return sum("kvm" in link.name for link in links), maps.count("kvm-vcpu")


@pytest.mark.parametrize("by", ["close", "nobody"])
def test_nothing_is_left(by: str, vm: KvmVm) -> None:
    gc.collect()
    before = held()
    other = Kvm()
    machine = other.create_vm()
    vcpus = [machine.create_vcpu(number) for number in range(3)]
    memory = machine.create_guest_memfd(PAGE)
    descriptors, mappings = held()
    assert descriptors - before[0] >= 6  # Python keeps a duplicate for each mapping
    assert mappings - before[1] == 3
    if by == "close":
        other.close()
        machine.close()
        assert held() == (before[0] + 1, before[1])  # the guest_memfd is the caller's
        memory.close()
    del other, machine, vcpus, memory
    gc.collect()
    assert held() == before


def test_failure_leaves_nothing(vm: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "no")

    gc.collect()
    before = held()
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="no"):
        vm.create_vcpu()
    monkeypatch.undo()
    with suppress(OSError):
        vm.create_guest_memfd(PAGE, flags=1 << 40)  # type: ignore[arg-type]
    gc.collect()
    assert held() == before


def test_closed_by_the_handler_of_a_signal_while_it_runs(
    vm: KvmVm, ram: RamBlock, vcpu: Vcpu
) -> None:
    write_code(ram, CODE, ENDLESS)
    before = signal.signal(signal.SIGUSR1, lambda *_: vm.close())
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        assert vcpu.run() == InterruptedExit()
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    with pytest.raises(UsageError, match="closed"):
        vcpu.run()


def test_what_the_guest_sees_lives_as_long_as_its_vcpu() -> None:
    def vcpu_alone() -> tuple[Vcpu, int]:
        kvm = Kvm()
        vm = kvm.create_vm()
        block = RamBlock.create("ram", SIZE)
        GuestMemory(vm).map(block, 0)
        return vm.create_vcpu(), block.address

    vcpu, address = vcpu_alone()
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    assert f"{address:x}-" in maps  # otherwise something else could come to lie there
    vcpu.close()


def test_kicks_do_not_pile_up(ram: RamBlock, vcpu: Vcpu) -> None:
    write_code(ram, CODE, ENDLESS)
    kicked = threading.Event()

    def kick_often() -> None:
        time.sleep(0.05)
        for _ in range(200):
            vcpu.kick()
        kicked.set()

    thread = threading.Thread(target=kick_often)
    thread.start()
    exits = 0
    while not kicked.is_set():
        assert vcpu.run() == InterruptedExit()
        exits += 1
    thread.join()
    vcpu.kick()
    assert vcpu.run() == InterruptedExit()
    write_code(ram, CODE, HALT)
    registers = vcpu.registers
    registers.rip = CODE
    vcpu.registers = registers
    exit = vcpu.run()
    if exit == InterruptedExit():  # the last of the kicks, at most
        exit = vcpu.run()
    assert exit == HaltExit()
