# SPDX-License-Identifier: Apache-2.0
"""Many guests: each combination of values, and one row of a table for each policy and target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod

import msgspec

from ramblock.errors import UsageError
from ramblock.plan.guest import Guest, OsProfile, Pluggable, Profile, Technology
from ramblock.plan.limits import Limits
from ramblock.plan.row import Row, row
from ramblock.plan.span import Span
from ramblock.plan.targets import POLICIES, TARGETS
from ramblock.units import MIB, parse_size

__all__ = ["AXES", "COLUMNS", "Sweep", "parse_axis"]

#: The fields that can vary. ``policy`` and ``target`` choose rows, ``dma-entry-limit`` changes the
#: host, the others the guest.
AXES = (
    "memory", "vcpus", "numa", "device", "os", "tee", "virtio-mem", "backing", "conversions",
    "policy", "target", "dma-entry-limit",
)  # fmt: skip

_SPANS = (
    "boot_entries", "peak_entries", "final_entries", "boot_maps", "boot_unmaps", "maps_per_second",
    "unmaps_per_second", "shared", "pinned", "held_twice", "page_tables",
)  # fmt: skip

#: The columns of the table, in order. Bytes, and numbers; a range is three columns.
COLUMNS = (
    "guest", "memory", "vcpus", "numa_nodes", "devices", "os", "technology", "virtio_mem",
    "backing_page", "conversions", "dma_entry_limit", "policy", "target", "verdict", "why",
    *(f"{name}_{end}" for name in _SPANS for end in ("low", "expected", "high")),
    "worst_entries", "limit", "left", "qemu_needed", "qemu_passes",
)  # fmt: skip

Value = int | str | bool | None
Point = tuple[str, ...]

_MOST_VALUES = 1_000_000
_MOST_GUESTS = 10_000_000


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """
    Read one axis: ``NAME=A,B,C``, ``NAME=LOW..HIGH`` (doubling), or ``NAME=LOW..HIGH+STEP``.

    :return: Its name and its values, as they would be given one by one.
    :raises UsageError: It is none, or names nothing that can vary.
    """
    name, equals, values = text.partition("=")
    if name not in AXES or not equals or not values:
        raise UsageError(
            f"--sweep {text}", value=text, expected=f"NAME=VALUES, NAME one of {', '.join(AXES)}"
        )
    if ".." not in values:
        return name, tuple(values.split(","))
    low_text, _, rest = values.partition("..")
    high_text, plus, step_text = rest.partition("+")
    low, high = parse_size(low_text), parse_size(high_text)
    step = parse_size(step_text) if plus else 0
    if not 0 < low <= high or (plus and step <= 0):
        raise UsageError(
            f"--sweep {text}",
            value=text,
            expected="LOW..HIGH with 0 < LOW <= HIGH, and a STEP above 0",
        )
    found = []
    value = low
    while value <= high:
        found.append(str(value))
        if len(found) > _MOST_VALUES:
            raise UsageError(
                f"--sweep {text}: too many values", value=text, expected=f"at most {_MOST_VALUES:,}"
            )
        value = value + step if plus else value * 2
    return name, tuple(found)


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep; it can be sent to another process."""

    guest: Guest
    """The fixed values."""
    limits: Limits
    axes: tuple[tuple[str, tuple[str, ...]], ...]

    def check(self) -> None:
        """
        Check every value of every axis.

        :raises UsageError: One makes no sense; nothing was computed.
        """
        guests = prod(len(values) for _, values in self.axes)
        if guests > _MOST_GUESTS:
            raise UsageError(
                f"{guests:,} combinations", value=guests, expected=f"at most {_MOST_GUESTS:,}"
            )
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise UsageError("an axis is given twice", value=names)
        for name, values in self.axes:
            for value in values:
                guest, _ = _apply(self.guest, self.limits, {name: value})
                guest.check()

    def __len__(self) -> int:
        """How many guests."""
        return prod(len(values) for name, values in self.axes if name not in ("policy", "target"))

    def points(self) -> Iterator[Point]:
        """Yield the values that make each guest, in the order of :meth:`names`."""
        yield from product(
            *(values for name, values in self.axes if name not in ("policy", "target"))
        )

    def names(self) -> list[str]:
        """Name the fields that vary from guest to guest."""
        return [name for name, _ in self.axes if name not in ("policy", "target")]

    def rows(self, first: int, points: Sequence[Point]) -> list[dict[str, Value]]:
        """
        Plan for some of the guests.

        :param first: Number of the first of them.
        :return: The rows of the table.
        """
        axes = dict(self.axes)
        policies = axes.get("policy", tuple(policy.value for policy in POLICIES))
        targets = axes.get("target", tuple(target.name for target in TARGETS))
        names = self.names()
        found = []
        for number, point in enumerate(points, first):
            guest, limits = _apply(self.guest, self.limits, dict(zip(names, point, strict=True)))
            guest.check()
            for target in TARGETS:
                for policy in POLICIES:
                    if target.name in targets and policy.value in policies:
                        made = row(guest, policy, target, limits)
                        found.append(_flat(number, guest, limits, made))
        return found


def _apply(guest: Guest, limits: Limits, values: Mapping[str, str]) -> tuple[Guest, Limits]:
    """Change the fields that vary."""
    for name, value in values.items():
        try:
            if name == "dma-entry-limit":
                number = parse_size(value)
                if not 1 <= number < 1 << 32:
                    raise ValueError
                limits = msgspec.structs.replace(limits, dma_entry_limit=number)
            elif name == "policy":
                if value not in {policy.value for policy in POLICIES}:
                    raise ValueError
            elif name == "target":
                if value not in {target.name for target in TARGETS}:
                    raise ValueError
            else:
                guest = msgspec.structs.replace(guest, **_guest_field(name, value))
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{value!r} is no {name}", value=value) from None
    return guest, limits


def _guest_field(name: str, value: str) -> dict[str, object]:
    if name == "memory":
        return {"memory": parse_size(value)}
    if name == "backing":
        return {"backing_page": parse_size(value)}
    if name == "virtio-mem":
        size, _, block = value.partition(":")
        if not parse_size(size):
            return {"virtio_mem": None}
        return {"virtio_mem": Pluggable(parse_size(size), parse_size(block) if block else 2 * MIB)}
    if name == "device":
        return {"devices": (Profile(value),)}
    if name == "os":
        return {"os": tuple(OsProfile(part) for part in value.split("/"))}
    if name == "tee":
        return {"technology": Technology(value)}
    return {{"vcpus": "vcpus", "numa": "numa_nodes"}.get(name, name): int(value)}


def _flat(number: int, guest: Guest, limits: Limits, made: Row) -> dict[str, Value]:
    flat: dict[str, Value] = dict.fromkeys(COLUMNS)
    flat |= {
        "guest": number,
        "memory": guest.memory,
        "vcpus": guest.vcpus,
        "numa_nodes": guest.numa_nodes,
        "devices": "+".join(guest.devices),
        "os": "/".join(guest.os),
        "technology": guest.technology.value,
        "virtio_mem": guest.virtio_mem.size if guest.virtio_mem else 0,
        "backing_page": guest.backing_page,
        "conversions": guest.conversions,
        "dma_entry_limit": limits.dma_entry_limit,
        "policy": made.policy,
        "target": made.target,
        "verdict": made.verdict.value,
        "why": made.why,
    }
    if made.need is not None:
        for name in _SPANS:
            span: Span = getattr(made.need, name)
            for end in ("low", "expected", "high"):
                flat[f"{name}_{end}"] = getattr(span, end)
        flat["worst_entries"] = made.need.worst_entries
    for room in made.headroom:
        if room.counts_mappings:
            flat |= {"limit": room.limit, "left": room.left}
    if made.qemu is not None:
        flat |= {"qemu_needed": made.qemu.needed, "qemu_passes": made.qemu.passes}
    return flat
