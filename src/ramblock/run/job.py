# SPDX-License-Identifier: Apache-2.0
"""
The main job: a confidential guest that converts pages while devices do DMA, watched by a verifier.

Everything is real but the kernel: memory, its freeing, the devices' threads and their accesses through IOVAs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter_ns
from typing import Protocol

from ramblock.dma.mapper import Mapper
from ramblock.dma.soft import SoftIommu
from ramblock.dma.target import DmaTarget, HostRange
from ramblock.errors import (
    ConversionError,
    ConversionInterrupted,
    MappingLimitError,
    PoisonedError,
    RamblockError,
    UsageError,
)
from ramblock.events import StateChanged
from ramblock.guest.memory import GuestMemory
from ramblock.memory.attributes import PageState
from ramblock.memory.backend import HostMemoryBackend
from ramblock.memory.backing import StandInPrivate
from ramblock.memory.block import RamBlock
from ramblock.run.device import Buffer, Device
from ramblock.run.faults import FaultPlan
from ramblock.run.guest_script import Action, GuestScript, Request
from ramblock.run.injected import InjectedTarget
from ramblock.run.layout import BlockPlace, plan_layout
from ramblock.run.pinned import PinnedIommu
from ramblock.run.replay import RecordedGuest
from ramblock.run.report import RunReport
from ramblock.run.scenario import Scenario, load_workload, workload_names
from ramblock.run.tally import Outcome, Tally
from ramblock.run.trace_writer import TRACE_VERSION, TraceWriter
from ramblock.run.verifier import Region, Verifier, ViolationKind
from ramblock.run.watched import FreeAccount, WatchedIommu, WatchedPrivate, WatchedShared, WatchedVm
from ramblock.units import PAGE_SIZE

__all__ = ["Progress", "Run"]

_PROGRESS_EVERY = 64


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, done: int, total: int | None, tally: Tally, violations: int) -> None:
        """Show where the run is, every few requests; *total* is None when it is not known."""


class Run:
    """
    One run: build it, :meth:`execute` it, read the report.

    :param scenario: What to run.
    :param trace_path: Where to write the trace; None: nowhere.
    :raises UsageError: Unknown workload, or faults that cannot be read.
    :raises TraceError: The workload is a trace that cannot be read.
    :raises OSError: The host lacks memory, or a file cannot be opened.
    """

    def __init__(self, scenario: Scenario, trace_path: Path | None = None) -> None:
        self._scenario = scenario
        self._faults = FaultPlan.parse(scenario.run.inject)
        self._recorded = self._find_recording()
        devices = scenario.devices.count
        if self._recorded is not None:
            self._places = self._recorded.places
            self._script = None
        else:
            self._places = plan_layout(int(scenario.guest.memory), int(scenario.guest.bios))
            self._script = GuestScript(
                load_workload(scenario.run.workload), self._places, devices, scenario.run.seed
            )
        self._trace = TraceWriter(trace_path)
        self._emit_start()
        names = [f"iommu{number}" for number in range(devices)]
        regions = [Region(place.gpa, place.size, place.confidential) for place in self._places]
        self._verifier = Verifier(regions, names)
        self._account = FreeAccount()
        self._tally = Tally()
        self._peak_entries = 0
        self._peak_shared = 0
        self._memory = GuestMemory(WatchedVm(self._verifier, self._trace, self._faults))
        self._memory.observer = self._note_state_change
        self._watched_shared: list[WatchedShared] = []
        self._private: dict[str, StandInPrivate] = {}
        self._blocks = {place.name: self._make_block(place) for place in self._places}
        self._iommus = [self._make_iommu(name) for name in names]
        self._injected: InjectedTarget | None = None
        self._mappers = self._attach()
        self._devices = self._make_devices()

    # -- building -------------------------------------------------------------------------------------------------

    def _find_recording(self) -> RecordedGuest | None:
        name = self._scenario.run.workload
        path = Path(name)
        return RecordedGuest(path) if name not in workload_names() and path.is_file() else None

    def _emit_start(self) -> None:
        self._trace.emit(
            "start",
            version=TRACE_VERSION,
            clock="CLOCK_MONOTONIC",
            page_size=PAGE_SIZE,
            blocks=[place._asdict() for place in self._places],
        )

    def _make_block(self, place: BlockPlace) -> RamBlock:
        watch = (place.gpa, self._verifier, self._trace, self._faults, self._account)
        shared = WatchedShared(HostMemoryBackend(size=place.size).allocate(place.name), *watch)
        self._watched_shared.append(shared)
        private = None
        if place.confidential:
            self._private[place.name] = StandInPrivate(place.name, place.size)
            private = WatchedPrivate(self._private[place.name], *watch)
        block = RamBlock(place.name, shared, private, owns_private=False)
        self._memory.map(block, place.gpa, readonly=not place.confidential)
        return block

    def _make_iommu(self, name: str) -> WatchedIommu:
        if self._scenario.run.uncoordinated:
            pinned = PinnedIommu()
            for shared in self._watched_shared:
                shared.pinned.append(pinned)
            return WatchedIommu(name, pinned, self._verifier, self._trace)
        return WatchedIommu(
            name, SoftIommu(cut=self._scenario.devices.cut), self._verifier, self._trace
        )

    def _attach(self) -> list[Mapper]:
        if self._scenario.run.uncoordinated:
            self._map_everything()
            return []
        devices = self._scenario.devices
        mappers = []
        for number, iommu in enumerate(self._iommus):
            target: DmaTarget = iommu
            if number == 0 and self._faults:
                target = self._injected = InjectedTarget(iommu, self._faults)
            mappers.append(
                self._memory.attach(
                    target, devices.mapping_policy, max_mappings=devices.max_mappings
                )
            )
        return mappers

    def _map_everything(self) -> None:
        """Map all RAM once, and tell nobody of what comes: what a VMM without this mechanism does."""
        for iommu in self._iommus:
            for place in self._places:
                block = self._blocks[place.name]
                memory = HostRange(block.fd, 0, block.address, block.size)
                iommu.map(place.gpa, memory, writable=place.confidential)

    def _make_devices(self) -> list[Device]:
        ram = [(place.gpa, place.size) for place in self._places]
        forbidden = None if self._script is None else self._script.forbidden
        seed = self._scenario.run.seed
        return [
            Device(number, iommu, self._verifier, seed, ram, forbidden)
            for number, iommu in enumerate(self._iommus)
        ]

    # -- running --------------------------------------------------------------------------------------------------

    def execute(self, progress: Progress) -> RunReport:
        """
        Run it, compare everything, and give everything back.

        Ctrl-C ends the run early, not the report. The trace is written in any case.
        """
        began = perf_counter_ns()
        interrupted = False
        try:
            for device in self._devices:
                device.start()
            self._work(progress)
        except KeyboardInterrupt:
            interrupted = True
        elapsed = perf_counter_ns() - began
        for device in self._devices:
            device.stop()
        return self._finish(elapsed, interrupted=interrupted)

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
        yield from islice(self._script.steady(), max(self._scenario.run.conversions - boot, 0))

    def _arm(self) -> None:
        """Faults on purpose count from here."""
        self._faults.armed = True
        if self._injected is not None:
            self._injected.arm()

    def _work(self, progress: Progress) -> None:
        total = None if self._recorded is not None else self._scenario.run.conversions
        if self._recorded is not None:
            self._arm()
        for number, request in enumerate(self._requests(), 1):
            outcome = self._serve(request)
            if self._script is not None:
                self._script.done(request, converted=outcome in (Outcome.DONE, Outcome.UNCHANGED))
            if number % _PROGRESS_EVERY == 0:
                progress.update(number, total, self._tally, self._verifier.counts.total())
            if outcome is Outcome.POISONED:
                break  # a VMM stops the guest here
        progress.update(self._tally.requests, total, self._tally, self._verifier.counts.total())

    def _serve(self, request: Request) -> Outcome:
        """Do what a driver does around one request, and the request."""
        buffer = request.buffer
        if request.action is Action.FREE and buffer is not None:
            self._devices[buffer.device].take(buffer)
            self._check_content(buffer)
        outcome = self._convert(request)
        if buffer is None:
            return outcome
        converted = outcome in (Outcome.DONE, Outcome.UNCHANGED)
        if request.to is PageState.PRIVATE and converted:
            self._touch_privately(buffer)
        elif converted or request.action is Action.FREE:
            self._devices[buffer.device].give(buffer)
        return outcome

    def _convert(self, request: Request) -> Outcome:
        watching = self._verifier.spent_here_ns()
        reason = ""
        began = perf_counter_ns()
        try:
            result = self._memory.convert(request.gpa, request.size, request.to)
        except ConversionInterrupted:
            raise
        except RamblockError as error:
            ended = perf_counter_ns()
            outcome, reason = _classify(error)
        else:
            ended = perf_counter_ns()
            outcome = Outcome.DONE if result.changed_bytes else Outcome.UNCHANGED
            self._count(request, result.changed_bytes, result.map_calls, result.unmap_calls)
        spent = self._verifier.spent_here_ns() - watching
        self._tally.note(
            request.action.value, max(request.size, 0), outcome, max(ended - began - spent, 0)
        )
        if reason:
            self._tally.reasons[reason] += 1
        if self._trace.active:
            self._trace.emit(
                "conversion",
                gpa=_encodable(request.gpa),
                size=_encodable(request.size),
                to=request.to,
                action=request.action,
                result=outcome,
                took=ended - began,
                **({"reason": reason} if reason else {}),
            )
        return outcome

    def _count(self, request: Request, changed: int, map_calls: int, unmap_calls: int) -> None:
        tally = self._tally
        tally.changed_bytes += changed
        tally.map_calls += map_calls
        tally.unmap_calls += unmap_calls
        if request.to is PageState.SHARED:
            tally.pages_to_shared += changed // PAGE_SIZE
        else:
            tally.pages_to_private += changed // PAGE_SIZE
        self._peak_shared = max(self._peak_shared, tally.pages_to_shared - tally.pages_to_private)
        self._peak_entries = max(
            self._peak_entries, sum(mapper.entries for mapper in self._mappers)
        )

    def _check_content(self, buffer: Buffer) -> None:
        """Read, as the guest, what the device wrote last: it must be there."""
        place, block = self._block_at(buffer.gpa)
        for offset, data in buffer.written.items():
            if block.read(buffer.gpa - place.gpa + offset, len(data)) != data:
                device = self._iommus[buffer.device].name
                self._verifier.violation(
                    ViolationKind.LOST_WRITE, device, buffer.gpa + offset, len(data)
                )

    def _touch_privately(self, buffer: Buffer) -> None:
        """Use the page privately, so that there is something to free when it is shared again."""
        place, _ = self._block_at(buffer.gpa)
        self._private[place.name].write(buffer.gpa - place.gpa, b"private")

    def _block_at(self, gpa: int) -> tuple[BlockPlace, RamBlock]:
        place = next(place for place in self._places if place.gpa <= gpa < place.end)
        return place, self._blocks[place.name]

    def _note_state_change(self, event: StateChanged) -> None:
        self._trace.emit(
            "state_change",
            block=event.block,
            offset=event.offset,
            size=event.size,
            before=event.before,
            after=event.after,
        )

    # -- the end --------------------------------------------------------------------------------------------------

    def _finish(self, elapsed: int, *, interrupted: bool) -> RunReport:
        memory = self._memory
        shared = list(memory.ranges(PageState.SHARED))
        tables = {
            iommu.name: [(mapping.iova, mapping.size) for mapping in iommu.inner.mappings()]
            for iommu in self._iommus
        }
        attached = not self._scenario.run.uncoordinated and not memory.poisoned
        watching_ns = self._verifier.spent_ns()
        self._verifier.compare(shared, tables, attached=attached)
        if self._injected is not None:
            self._injected.account()
        state = "".join(f"{gpa:x}+{size:x}\n" for gpa, size in shared)
        report = RunReport(
            scenario=self._scenario,
            places=self._places,
            tally=self._tally,
            verifier=self._verifier,
            devices=[device.counts for device in self._devices],
            device_errors=[
                repr(device.error) for device in self._devices if device.error is not None
            ],
            entries={mapper_name(mapper): mapper.entries for mapper in self._mappers},
            policy=self._mappers[0].policy.value if self._mappers else "none",
            peak_entries=self._peak_entries,
            peak_shared_pages=self._peak_shared,
            in_doubt=[(gpa, size, repr(target)) for gpa, size, target in memory.in_doubt()],
            poisoned=memory.poisoned,
            freed_bytes=self._account.freed_bytes,
            not_freed_bytes=sum(block.not_freed_bytes for block in self._blocks.values()),
            orphaned_bytes=sum(
                iommu.inner.orphaned_bytes
                for iommu in self._iommus
                if isinstance(iommu.inner, PinnedIommu)
            ),
            injected=dict(+self._faults.happened),
            state_hash=hashlib.sha256(state.encode()).hexdigest()[:16],
            elapsed_ns=elapsed,
            watching_ns=watching_ns,
            interrupted=interrupted,
        )
        self._close()
        report.trace_error = self._trace.error
        report.trace_events = self._trace.events
        return report

    def _close(self) -> None:
        self._memory.observer = None
        self._trace.close()
        for block in self._blocks.values():
            block.close()
        for private in self._private.values():
            private.close()
        for iommu in self._iommus:
            iommu.close()


def mapper_name(mapper: Mapper) -> str:
    """Name a mapper after its IOMMU."""
    return repr(mapper.target)


def _classify(error: RamblockError) -> tuple[Outcome, str]:
    """Tell what a failed conversion counts as, and why it failed, in a few words."""
    if isinstance(error, PoisonedError):
        return Outcome.POISONED, str(error)
    if isinstance(error, ConversionError):
        return Outcome.ROLLED_BACK, f"step {error.step!r} failed: {error.__cause__}"
    if isinstance(error, MappingLimitError):
        return Outcome.OVER_BUDGET, f"the budget of {error.limit} mappings is used up"
    if isinstance(error, UsageError):
        return Outcome.REFUSED, _usage_reason(error)
    raise error


_USAGE_REASONS = (
    ("nothing is mapped", "a hole"),
    ("no private backing", "RAM without private backing"),
    ("not aligned", "not aligned to pages"),
    ("does not lie in", "past the end of the address space"),
    ("must not be negative", "a negative address"),
)


def _usage_reason(error: UsageError) -> str:
    text = str(error)
    return next((reason for part, reason in _USAGE_REASONS if part in text), text)


def _encodable(value: int) -> int | str:
    """Write a number as JSON readers take it; hostile ones do not fit into 64 bits."""
    return value if 0 <= value < 1 << 64 else hex(value)
