# SPDX-License-Identifier: Apache-2.0
"""
The scenario of a run: a file, the named workloads, and their defaults.

A scenario is TOML, decoded and checked by msgspec; the command line overrides single values. Every
error names the file, the key and the expected value.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from ramblock.dma.target import MappingPolicy
from ramblock.errors import UsageError
from ramblock.units import GIB, MIB, PAGE_SIZE, format_size, parse_size

__all__ = [
    "BootPhase",
    "Buffers",
    "Devices",
    "Guest",
    "Job",
    "Scenario",
    "SteadyPhase",
    "Workload",
    "load_scenario",
    "load_workload",
    "workload_names",
]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Weight = Annotated[int, msgspec.Meta(ge=0)]

S = TypeVar("S")

# The workloads' zones have to fit.
_LEAST_MEMORY = 64 * MIB


class Size(int):
    """A number of bytes that may be written as ``"4G"`` or as a plain number."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Guest(_Strict, frozen=True):
    """The guest: its memory, and its vCPU or script."""

    memory: Size = Size(4 * GIB)
    """Below 2 GiB first, the rest from 4 GiB up on two NUMA nodes."""
    bios: Size = Size(4 * MIB)
    """Ordinary RAM that ends at 4 GiB, read-only for devices; 0: none."""
    kind: Literal["auto", "kvm", "script"] = "auto"
    """A vCPU of KVM, or only a script; ``auto``: a vCPU where KVM enforces page attributes."""


class Devices(_Strict, frozen=True):
    """The devices that do DMA beside the conversions, each behind an IOMMU of its own."""

    count: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2
    policy: Literal["auto", "page", "run"] = "auto"
    max_mappings: Positive | None = None
    """The operator's budget per device."""
    cut: bool = True
    """Whether the software IOMMUs can cut."""
    iommu: Literal["soft", "type1", "iommufd", "iommufd-native", "iommufd-cutting", "vfio-user"] = (
        "soft"
    )
    """The DMA target of the devices; ``count`` has a meaning for ``soft`` only."""
    pci: list[str] = []
    """
    Addresses of the real devices of this host.

    None: the edu and the iommu-testdev that are there.
    """
    sockets: list[str] = []
    """With ``vfio-user``: where the servers listen, one device each."""

    @property
    def on_hardware(self) -> bool:
        """Whether the devices are real ones of this host."""
        return self.iommu not in ("soft", "vfio-user")

    @property
    def mapping_policy(self) -> MappingPolicy:
        """The policy as the library's type."""
        return MappingPolicy(self.policy)


class Job(_Strict, frozen=True):
    """The length of the run, and its hardships."""

    conversions: Positive | None = None
    """Requests in all, those of boot among them; None: as many as suit the kind of guest."""
    seed: int = 1
    workload: str = "linux"
    """A named workload, or the path of a trace written by ``--trace``."""
    uncoordinated: bool = False
    """Map everything at boot and tell nobody of conversions."""
    inject: str = ""
    """Faults on purpose: ``map:3,unmap:7,unmap:short:9,attribute:2,free:1``."""


class Scenario(_Strict, frozen=True):
    """A scenario file: tables ``[guest]``, ``[devices]`` and ``[run]``, all optional."""

    guest: Guest = Guest()
    devices: Devices = Devices()
    run: Job = Job()


class BootPhase(_Strict, frozen=True):
    """Memory that the guest shares first."""

    swiotlb: bool
    rings: Weight
    ring_size: Size


class SteadyPhase(_Strict, frozen=True):
    """How often each thing happens afterwards, relative to the others."""

    alloc: Weight
    free: Weight
    accept: Weight
    hostile: Weight
    reboot: Weight = 0


class Buffers(_Strict, frozen=True):
    """DMA buffers."""

    min_size: Size
    max_size: Size
    live: Size


class Workload(_Strict, frozen=True):
    """A named workload; files are in ``run/workloads/``, and adding one is adding a file."""

    description: str
    source: str
    boot: BootPhase
    steady: SteadyPhase
    buffers: Buffers


def _decode_size(kind: type, value: Any) -> Any:
    if kind is not Size:
        raise NotImplementedError
    try:
        size = parse_size(value) if isinstance(value, str) else value
    except UsageError:
        size = None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or size % PAGE_SIZE:
        raise ValueError(f'expected a size in whole pages such as "4G" or "64K", got {value!r}')
    return Size(size)


def _decode(text: str, kind: type[S], path: str) -> S:
    try:
        return msgspec.convert(tomllib.loads(text), kind, dec_hook=_decode_size)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        expected = _expected(kind, key, problem)
        text = f"{path}: {key + ': ' if key else ''}{problem}"
        if expected:
            text += f", expected {expected}"
        raise UsageError(text, value=key, expected=expected) from None


def _expected(kind: type, key: str, problem: str) -> str | None:
    """Complete msgspec's message: the keys there are, or the words that a key takes."""
    for name in key.split(".") if key else ():
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == name)
    if "unknown field" in problem:
        return "one of " + ", ".join(field.name for field in msgspec.structs.fields(kind))
    return " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else None


def load_scenario(path: Path) -> Scenario:
    """
    Read a scenario file.

    :raises UsageError: It is no TOML, or a key is unknown or has a wrong value; the text names
        file, key and the expected value.
    :raises OSError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}") from None
    scenario = _decode(text, Scenario, str(path))
    check_scenario(scenario, str(path))
    return scenario


def check_scenario(scenario: Scenario, where: str) -> None:
    """
    Check the rules that types cannot express.

    :param where: The file or the command line, for the message.
    :raises UsageError: Too little memory; the text says how much. Or devices that do not go with
        the IOMMU.
    """
    devices = scenario.devices
    if devices.pci and not devices.on_hardware:
        raise UsageError(
            f"{where}: devices.pci: {', '.join(devices.pci)} behind a software IOMMU",
            value=devices.pci,
            expected="devices.iommu (--iommu) to be a real one",
        )
    if bool(devices.sockets) is not (devices.iommu == "vfio-user"):
        raise UsageError(
            f"{where}: devices.sockets: {', '.join(devices.sockets) or 'none'} with devices.iommu"
            f" {devices.iommu}",
            value=devices.sockets,
            expected="sockets where devices.iommu is vfio-user (--iommu vfio-user:PATH),"
            " and only there",
        )
    if scenario.run.uncoordinated and devices.iommu == "vfio-user":
        raise UsageError(
            f"{where}: run.uncoordinated with vfio-user",
            value=devices.iommu,
            expected="an IOMMU that pins: a server with the descriptor reaches freed memory in any"
            " case",
        )
    if scenario.guest.memory < _LEAST_MEMORY:
        raise UsageError(
            f"{where}: guest.memory: {format_size(scenario.guest.memory)} is too small,"
            f" expected at least {format_size(_LEAST_MEMORY)}",
            value=scenario.guest.memory,
        )


def workload_names() -> list[str]:
    """List the named workloads."""
    folder = resources.files("ramblock.run") / "workloads"
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_workload(name: str) -> Workload:
    """
    Load a named workload.

    :raises UsageError: There is none of that name; the text lists them.
    """
    names = workload_names()
    if name not in names:
        raise UsageError(
            f"workload {name!r} is neither one of {', '.join(names)} nor a file",
            value=name,
            expected=", ".join(names),
        )
    file = resources.files("ramblock.run") / "workloads" / f"{name}.toml"
    return _decode(file.read_text(encoding="utf-8"), Workload, f"workload {name}")
