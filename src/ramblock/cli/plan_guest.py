# SPDX-License-Identifier: Apache-2.0
"""The guest and the host that the options of ``ramblock plan`` describe."""

from __future__ import annotations

import argparse
import re

import msgspec

from ramblock.errors import UsageError
from ramblock.plan.guest import Guest, OsProfile, Pluggable, Profile, Technology
from ramblock.plan.limits import Limits, limits_of_host
from ramblock.plan.span import Span
from ramblock.units import GIB, MIB, parse_size

__all__ = ["guest_of", "limits_of"]

_MOST_DEVICES = 256
_MOST_NUMBER = (1 << 32) - 1
_MOST_BYTES = (1 << 64) - 1


def guest_of(arguments: argparse.Namespace) -> Guest:
    """
    Make the guest; in a sweep its memory may be left out.

    :raises UsageError: A value makes no sense.
    """
    if arguments.memory is None and not any(text.startswith("memory=") for text in arguments.sweep):
        raise UsageError("no guest to plan for", expected="--memory SIZE, or a recording")
    given: dict[str, object] = {
        "memory": GIB if arguments.memory is None else parse_size(arguments.memory),
        "devices": tuple(_devices(arguments.device)),
    }
    for option, field in (
        ("vcpus", "vcpus"),
        ("numa", "numa_nodes"),
        ("conversions", "conversions"),
    ):
        if getattr(arguments, option) is not None:
            given[field] = getattr(arguments, option)
    if arguments.os is not None:
        given["os"] = tuple(_os_profile(name) for name in arguments.os.split(","))
    if arguments.tee is not None:
        given["technology"] = Technology(arguments.tee)
    if arguments.virtio_mem is not None:
        size, _, block = arguments.virtio_mem.partition(":")
        given["virtio_mem"] = Pluggable(parse_size(size), parse_size(block) if block else 2 * MIB)
    if arguments.backing is not None:
        given["backing_page"] = parse_size(arguments.backing)
    if arguments.rate is not None:
        given["rate"] = _rate(arguments.rate)
    return Guest(**given)  # type: ignore[arg-type]


def _devices(texts: list[str]) -> list[Profile]:
    found = []
    for text in texts:
        name, colon, number = text.partition(":")
        count = int(number) if re.fullmatch(r"[0-9]{1,4}", number) else 0 if colon else 1
        if name not in list(Profile) or not 1 <= count <= _MOST_DEVICES:
            raise UsageError(
                f"--device {text}",
                value=text,
                expected=f"{', '.join(Profile)}, or with how many: nic:2 (1 to {_MOST_DEVICES})",
            )
        found += [Profile(name)] * count
    return found


def _os_profile(name: str) -> OsProfile:
    if name not in list(OsProfile):
        raise UsageError(f"--os {name}", value=name, expected=", ".join(OsProfile))
    return OsProfile(name)


def _rate(text: str) -> Span:
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text, re.ASCII)
    if match is None:
        raise UsageError(f"--rate {text}", value=text, expected="N or LOW..HIGH, per second")
    low, high = match.groups()
    return Span.between(int(low), int(high or low))


def limits_of(arguments: argparse.Namespace) -> Limits:
    """
    Make the host.

    :raises UsageError: A limit is not positive.
    """
    limits = limits_of_host() if arguments.this_host else Limits()
    given: dict[str, int] = {}
    for name in ("dma_entry_limit", "max_iotlb_entries", "server_maps", "memslots"):
        number = getattr(arguments, name)
        if number is not None:
            given[name] = number
    for name in ("memlock", "cgroup"):
        text = getattr(arguments, name)
        if text is not None:
            given[name] = parse_size(text)
    for name, number in given.items():
        # Those that are numbers are 32-bit parameters.
        most = _MOST_BYTES if name in ("memlock", "cgroup") else _MOST_NUMBER
        if not 1 <= number <= most:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} {number}", value=number, expected=f"at least 1, at most {most:,}"
            )
    return msgspec.structs.replace(limits, **given)
