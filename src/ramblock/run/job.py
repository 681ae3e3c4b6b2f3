# SPDX-License-Identifier: Apache-2.0
"""
The main job: a confidential guest that converts pages while devices do DMA, watched by a verifier.

Memory, its freeing, and the accesses through IOVAs are real in any case. Who makes the requests (a
script, or a guest on a vCPU of KVM) and the kind of the devices (threads behind software IOMMUs, or
real ones behind VFIO) are the scenario's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from ramblock.discard.attributes import PageState
from ramblock.dma.mapper import Mapper
from ramblock.dma.target import DmaTarget, HostRange
from ramblock.errors import RamblockError
from ramblock.events import StateChanged
from ramblock.guest.block import RamBlock
from ramblock.hostmem.backend import HostMemoryBackend
from ramblock.run.counted import CountedMemory
from ramblock.run.device import Device
from ramblock.run.faults import FaultPlan
from ramblock.run.guest_script import GuestScript, Request
from ramblock.run.injected import InjectedTarget
from ramblock.run.layout import BlockPlace, first_free, plan_layout
from ramblock.run.ports import Ports, SoftPorts
from ramblock.run.ram import GuestRam
from ramblock.run.replay import RecordedGuest
from ramblock.run.report import GuestFacts, RunReport
from ramblock.run.scenario import Scenario, load_workload, workload_names
from ramblock.run.scripted import Guest, ScriptedGuest, is_converted
from ramblock.run.tally import Outcome, Tally
from ramblock.run.watched import (
    FreeAccount,
    Watch,
    WatchedShared,
    WatchedStandIn,
    WatchedTarget,
    WatchedVm,
)
from ramblock.testing.verifier import Region, Verifier
from ramblock.trace.writer import TRACE_VERSION, TraceWriter
from ramblock.units import PAGE_SIZE

if TYPE_CHECKING:
    from ramblock.run.machine import Machine

__all__ = ["Progress", "Run"]

_PROGRESS_EVERY = 64
_REQUESTS = 26_000
# With a vCPU or real devices, which may be emulated ones on an emulated machine, a hundred times
# slower: a minute or two there.
_REQUESTS_ON_REAL_PARTS = 500


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Show where the run is, every few requests; *total* is None when it is not known."""


class Run:
    """
    One run: build it, :meth:`execute` it, read the report.

    :param scenario: The scenario.
    :param trace_path: Where to write the trace; None: nowhere.
    :raises UsageError: Unknown workload, faults that cannot be read, or this host lacks a requested
        part; the text names it.
    :raises TraceError: The workload is a trace that cannot be read.
    :raises OSError: The host lacks memory, a file cannot be opened, or the kernel refused. Nothing
        is held, and devices are bound to their earlier drivers.
    """

    def __init__(self, scenario: Scenario, trace_path: Path | None = None) -> None:
        self._scenario = scenario
        self._faults = FaultPlan.parse(scenario.run.inject)
        self._recorded = self._find_recording()
        with ExitStack() as resources:
            self._build(trace_path, resources)
            self._resources = resources.pop_all()

    # -- building ----------------------------------------------------------------------------------

    def _find_recording(self) -> RecordedGuest | None:
        name = self._scenario.run.workload
        path = Path(name)
        return RecordedGuest(path) if name not in workload_names() and path.is_file() else None

    def _build(self, trace_path: Path | None, resources: ExitStack) -> None:
        """Make everything; later parts are closed first."""
        scenario = self._scenario
        workload = None if self._recorded is not None else load_workload(scenario.run.workload)
        self._places = (
            plan_layout(int(scenario.guest.memory), int(scenario.guest.bios))
            if self._recorded is None
            else self._recorded.places
        )
        self._trace = resources.enter_context(TraceWriter(trace_path))
        regions = [Region(place.gpa, place.size, place.confidential) for place in self._places]
        self._ports = self._open_ports(resources)
        self._watch = Watch(
            Verifier(regions, self._ports.names), self._trace, self._faults, FreeAccount()
        )
        machine = self._open_machine(resources)
        self._facts = GuestFacts(kind="script", why=self._why) if machine is None else machine.facts
        self._emit_start()
        devices = len(self._ports.names)
        self._script = (
            None
            if workload is None
            else GuestScript(workload, self._places, devices, scenario.run.seed)
        )
        vm = WatchedVm(self._watch) if machine is None else machine.vm
        self._memory = CountedMemory(vm, self._watch.verifier, self._trace)
        self._memory.observer = self._note_state_change
        self._ram = GuestRam(self._places)
        for place in self._places:
            self._add_block(place, machine, resources)
        self._injected: InjectedTarget | None = None
        self._mappers = self._attach()
        self._devices = self._make_devices()
        self._guest = self._start_guest(machine, resources)

    def _open_ports(self, resources: ExitStack) -> Ports:
        devices = self._scenario.devices
        ports: Ports
        if devices.iommu == "soft":
            pin = self._scenario.run.uncoordinated
            ports = SoftPorts(devices.count, cut=devices.cut, pin=pin)
        elif devices.iommu == "vfio-user":
            from ramblock.run.remote import RemotePorts

            ports = RemotePorts(devices.sockets)
        else:
            # Not at the top: most runs need nothing of VFIO.
            from ramblock.run.hardware import HardwarePorts
            from ramblock.run.preflight import choose_devices, refuse_unless_ready

            addresses = choose_devices(devices.pci)
            refuse_unless_ready(devices.iommu, addresses)
            ports = HardwarePorts(devices.iommu, addresses, first_free(self._places))
        resources.callback(ports.close)
        return ports

    def _open_machine(self, resources: ExitStack) -> Machine | None:
        self._why = ""
        if self._scenario.guest.kind == "script":
            return None
        from ramblock.run.machine import Machine, open_kvm

        kvm, self._why = open_kvm(self._scenario.guest.kind)
        if kvm is None:
            return None
        machine = Machine(kvm, self._why, self._watch)
        resources.callback(machine.close)
        return machine

    def _emit_start(self) -> None:
        self._trace.emit(
            "start",
            version=TRACE_VERSION,
            clock="CLOCK_MONOTONIC",
            page_size=PAGE_SIZE,
            blocks=[place._asdict() for place in self._places],
            guest=self._facts.kind,
            enforced_by=self._facts.enforced_by,
            targets=self._targets(),
        )

    def _targets(self) -> dict[str, str]:
        return dict(zip(self._ports.names, self._ports.descriptions, strict=True))

    def _add_block(self, place: BlockPlace, machine: Machine | None, resources: ExitStack) -> None:
        backing = HostMemoryBackend(size=place.size).allocate(place.name)
        shared = WatchedShared(backing, place.gpa, self._watch)
        if isinstance(self._ports, SoftPorts):
            self._ports.pin(shared)
        private = None
        if place.confidential:
            private = (
                WatchedStandIn(place.name, place.size, place.gpa, self._watch)
                if machine is None
                else machine.create_private(place)
            )
            self._ram.private[place.name] = private
            resources.callback(private.close)
        block = RamBlock(place.name, shared, private, owns_private=False)
        self._ram.blocks[place.name] = block
        resources.callback(block.close)
        self._memory.map(block, place.gpa, readonly=not place.confidential)

    def _attach(self) -> list[Mapper]:
        targets = self._ports.watch(self._watch)
        if self._scenario.run.uncoordinated:
            self._map_everything(targets)
            return []
        devices = self._scenario.devices
        mappers = []
        for number, watched in enumerate(targets):
            target: DmaTarget = watched
            if number == 0 and self._faults:
                target = self._injected = InjectedTarget(watched, self._faults)
            budgets = (devices.max_mappings, self._ports.budget(number))
            mappers.append(
                self._memory.attach(
                    target,
                    devices.mapping_policy,
                    max_mappings=min(
                        (limit for limit in budgets if limit is not None), default=None
                    ),
                )
            )
        return mappers

    def _map_everything(self, targets: Sequence[WatchedTarget]) -> None:
        """Map all RAM once, and tell nobody of conversions, like a VMM without this mechanism."""
        for target in targets:
            for place in self._places:
                block = self._ram.blocks[place.name]
                memory = HostRange(block.fd, 0, block.address, block.size)
                target.map(place.gpa, memory, writable=place.confidential)

    def _make_devices(self) -> Sequence[Device]:
        ram = [(place.gpa, place.size) for place in self._places]
        forbidden = None if self._script is None else self._script.forbidden
        return self._ports.make_devices(self._watch, self._scenario.run.seed, ram, forbidden)

    def _start_guest(self, machine: Machine | None, resources: ExitStack) -> Guest:
        parts = (self._memory, self._ram, self._devices, self._watch.verifier)
        if machine is None:
            return ScriptedGuest(*parts)
        from ramblock.run.programmed import ProgrammedGuest

        program = machine.start_program(self._places)
        resources.callback(program.close)
        return ProgrammedGuest(program, *parts, enforced=machine.enforced)

    # -- running -----------------------------------------------------------------------------------

    def execute(self, progress: Progress) -> RunReport:
        """
        Run it, compare everything, and give everything back.

        Ctrl-C ends the run early, not the report. The trace is written in any case.

        :raises GuestProgramError: The guest on the vCPU cannot go on; everything is given back.
        :raises StuckGuestError: It faults for ever; likewise.
        """
        began = perf_counter_ns()
        interrupted = False
        with ExitStack() as on_failure:
            on_failure.callback(self._close)
            on_failure.callback(self._stop_devices)
            try:
                for device in self._devices:
                    device.start()
                self._work(progress)
            except KeyboardInterrupt:
                interrupted = True
            elapsed = perf_counter_ns() - began
            self._stop_devices()
            report = self._finish(elapsed, interrupted=interrupted)
            on_failure.pop_all()
        return self._closed(report)

    def _stop_devices(self) -> None:
        for device in self._devices:
            device.stop()

    @property
    def _wanted(self) -> int:
        """How many requests there are to be."""
        real = self._facts.kind == "kvm" or self._scenario.devices.iommu != "soft"
        return self._scenario.run.conversions or (_REQUESTS_ON_REAL_PARTS if real else _REQUESTS)

    def _requests(self) -> Iterator[Request]:
        if self._recorded is not None:
            yield from self._recorded.requests()
            return
        assert self._script is not None  # one of the two
        boot = 0
        for request in self._script.boot():
            boot += 1
            yield request
        self._arm()
        yield from islice(self._script.steady(), max(self._wanted - boot, 0))

    def _arm(self) -> None:
        """Faults on purpose count from here."""
        self._faults.armed = True
        if self._injected is not None:
            self._injected.arm()

    def _work(self, progress: Progress) -> None:
        total = None if self._recorded is not None else self._wanted
        tally, counts = self._memory.tally, self._watch.verifier.counts
        if self._recorded is not None:
            self._arm()
        for number, request in enumerate(self._requests(), 1):
            outcome = self._guest.serve(request)
            if self._script is not None:
                self._script.done(request, converted=is_converted(outcome))
            if number % _PROGRESS_EVERY == 0:
                progress.update(number, total, tally, counts.total())
            if outcome is Outcome.POISONED:
                break  # a VMM stops the guest here
        else:
            self._guest.finish()
        progress.update(tally.requests, total, tally, counts.total())

    def _note_state_change(self, event: StateChanged) -> None:
        self._trace.emit(
            "state_change",
            block=event.block,
            offset=event.offset,
            size=event.size,
            before=event.before,
            after=event.after,
        )

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, elapsed: int, *, interrupted: bool) -> RunReport:
        memory, verifier = self._memory, self._watch.verifier
        shared = list(memory.ranges(PageState.SHARED))
        attached = not self._scenario.run.uncoordinated and not memory.poisoned
        watching_ns = verifier.spent_ns()
        verifier.compare(shared, self._ports.tables(), attached=attached)
        device_errors = [repr(device.error) for device in self._devices if device.error is not None]
        if attached:
            writable = [
                (start, end - start)
                for gpa, size in shared
                for place in self._places
                if place.confidential
                and (start := max(gpa, place.gpa)) < (end := min(gpa + size, place.end))
            ]
            try:
                self._ports.audit(writable, list(memory.ranges(PageState.PRIVATE)))
            except KeyboardInterrupt:
                interrupted = True
            except (RamblockError, OSError) as error:
                device_errors.append(repr(error))
        if self._injected is not None:
            self._injected.account()
        state = "".join(f"{gpa:x}+{size:x}\n" for gpa, size in shared)
        return RunReport(
            scenario=self._scenario,
            guest=self._facts,
            targets=self._targets(),
            places=self._places,
            tally=memory.tally,
            verifier=verifier,
            devices=[device.counts for device in self._devices],
            device_errors=device_errors,
            entries={mapper_name(mapper): mapper.entries for mapper in self._mappers},
            kernel_entries=self._ports.kernel_entries() if attached else {},
            policy=self._mappers[0].policy.value if self._mappers else "none",
            peak_entries=memory.peak_entries,
            peak_shared_pages=memory.peak_shared_pages,
            in_doubt=[(gpa, size, repr(target)) for gpa, size, target in memory.in_doubt()],
            poisoned=memory.poisoned,
            freed_bytes=self._watch.account.freed_bytes,
            not_freed_bytes=sum(block.not_freed_bytes for block in self._ram.blocks.values()),
            orphaned_bytes=self._ports.freed_while_mapped(),
            injected=dict(+self._faults.happened),
            state_hash=hashlib.sha256(state.encode()).hexdigest()[:16],
            elapsed_ns=elapsed,
            watching_ns=watching_ns,
            interrupted=interrupted,
        )

    def _closed(self, report: RunReport) -> RunReport:
        """Give everything back; failures are part of the report."""
        try:
            self._close()
        except (RamblockError, OSError) as error:
            report.device_errors.append(repr(error))
        report.trace_error = self._trace.error
        report.trace_events = self._trace.events
        return report

    def _close(self) -> None:
        self._memory.observer = None
        if (
            not self._memory.poisoned
        ):  # else mappings may stay, and the trace must not say that they are gone
            for name in self._ports.names:
                self._trace.emit("detach", target=name)
        self._trace.close()
        self._resources.close()


def mapper_name(mapper: Mapper) -> str:
    """Name a mapper after its IOMMU."""
    return repr(mapper.target)
