# SPDX-License-Identifier: Apache-2.0
"""The result of a run, as data; the command line draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ramblock.run.device import DeviceCounts
from ramblock.run.layout import BlockPlace
from ramblock.run.scenario import Scenario
from ramblock.run.tally import Outcome, Tally
from ramblock.testing.verifier import Verifier
from ramblock.units import PAGE_SIZE

__all__ = ["GuestFacts", "RunReport"]


@dataclass(frozen=True, kw_only=True)
class GuestFacts:
    """The maker of the requests, and the keeper of the page attributes."""

    kind: str
    """``kvm`` or ``script``."""
    why: str = ""
    """Why it was chosen, where it was left to the run."""
    call: str | None = None
    """The guest's call."""
    vm_type: str | None = None
    """Type of the VM."""
    enforced: bool = False
    """Whether the kernel enforces page attributes; otherwise they are only tracked."""
    private: str = "a stand-in"
    """The backing of private pages."""

    @property
    def enforced_by(self) -> str:
        """Who enforces page attributes, in a few words."""
        if self.enforced:
            return "KVM"
        if self.kind == "kvm":
            return "tracked only: this KVM does not know private pages"
        return "tracked only: no KVM in this run"


@dataclass(kw_only=True)
class RunReport:
    """Everything that is known at the end of a run."""

    scenario: Scenario
    guest: GuestFacts
    targets: dict[str, str]
    """A description of each device and its IOMMU, by the name of its target."""
    places: list[BlockPlace]
    tally: Tally
    verifier: Verifier
    devices: list[DeviceCounts]
    device_errors: list[str]
    entries: dict[str, int]
    """Mappings at the end, by device."""
    kernel_entries: dict[str, int]
    """The same as the kernel counts them, where it does."""
    policy: str
    """The choice of AUTO; ``none`` without coordination."""
    peak_entries: int
    """Most mappings at once, all devices together."""
    peak_shared_pages: int
    """Most pages shared at once."""
    in_doubt: list[tuple[int, int, str]]
    poisoned: bool
    freed_bytes: int
    """By the kernel's block count, before and after each free."""
    not_freed_bytes: int
    orphaned_bytes: int
    """Freed while mapped: devices reach them and the guest does not; without coordination only."""
    injected: dict[str, int]
    """Faults on purpose that came about, by kind."""
    state_hash: str
    """Of the ranges that are shared at the end."""
    elapsed_ns: int
    watching_ns: int
    interrupted: bool
    trace_error: OSError | None = field(default=None)
    trace_events: int = 0

    @property
    def failed(self) -> bool:
        """Whether the run found a violation or could not do its job."""
        return (
            not self.verifier.clean
            or self.poisoned
            or bool(self.device_errors)
            or self.miscounted
            or self.trace_error is not None
        )

    @property
    def exit_code(self) -> int:
        """0 clean, 1 a violation or a failure, 130 interrupted."""
        return 130 if self.interrupted else int(self.failed)

    @property
    def miscounted(self) -> bool:
        """Whether the kernel counts other mappings than we do."""
        return any(self.entries.get(name) != count for name, count in self.kernel_entries.items())

    def devices_total(self) -> DeviceCounts:
        """All devices together."""
        total = DeviceCounts()
        for counts in self.devices:
            for name, value in vars(counts).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def per_page(self) -> dict[str, int]:
        """Count the mappings of one per page for the same conversions, on all devices."""
        devices = len(self.devices)
        fixed = sum(place.size for place in self.places if not place.confidential) // PAGE_SIZE
        return {
            "map_calls": self.tally.pages_to_shared * devices,
            "unmap_calls": self.tally.pages_to_private * devices,
            "peak_entries": (self.peak_shared_pages + fixed) * devices,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything for machines; numbers of bytes, and nanoseconds where a name says so."""
        tally = self.tally
        total = self.devices_total()
        return {
            "guest": {
                "memory": self.scenario.guest.memory,
                "blocks": [place._asdict() for place in self.places],
                "kind": self.guest.kind,
                "why": self.guest.why,
                "call": self.guest.call,
                "vm_type": self.guest.vm_type,
                "private": self.guest.private,
            },
            "targets": self.targets,
            "seed": self.scenario.run.seed,
            "workload": self.scenario.run.workload,
            "coordinated": not self.scenario.run.uncoordinated,
            "enforced_by": self.guest.enforced_by,
            "conversions": {
                "requests": tally.requests,
                "outcomes": {outcome.value: tally.outcomes[outcome] for outcome in Outcome},
                "by_action": dict(sorted(tally.by_action.items())),
                "refusals": dict(tally.reasons.most_common()),
                "changed_bytes": tally.changed_bytes,
                "latency_us": tally.latencies(),
            },
            "mappings": {
                "policy": self.policy,
                "map_calls": tally.map_calls,
                "unmap_calls": tally.unmap_calls,
                "entries": self.entries,
                "kernel_entries": self.kernel_entries,
                "peak_entries": self.peak_entries,
                "one_per_page": self.per_page(),
            },
            "devices": vars(total),
            "memory": {
                "freed_bytes": self.freed_bytes,
                "not_freed_bytes": self.not_freed_bytes,
                "orphaned_bytes": self.orphaned_bytes,
                "peak_shared_bytes": self.peak_shared_pages * PAGE_SIZE,
            },
            "time": {
                "elapsed_ns": self.elapsed_ns,
                "conversions_ns": tally.conversion_ns,
                "verifier_ns": self.watching_ns,
            },
            "injected": self.injected,
            "state_hash": self.state_hash,
            "poisoned": self.poisoned,
            "in_doubt": [
                {"gpa": gpa, "size": size, "target": target} for gpa, size, target in self.in_doubt
            ],
            "device_errors": self.device_errors,
            "violations": {
                "count": self.verifier.counts.total(),
                "by_kind": {
                    kind.name.lower(): count for kind, count in self.verifier.counts.items()
                },
                "ranges": [
                    {"kind": kind.name.lower(), "target": target, "gpa": gpa, "size": size}
                    for kind, target, gpa, size in self.verifier.violations()
                ],
            },
            "trace": {
                "events": self.trace_events,
                "error": None if self.trace_error is None else str(self.trace_error),
            },
            "interrupted": self.interrupted,
            "exit_code": self.exit_code,
        }
