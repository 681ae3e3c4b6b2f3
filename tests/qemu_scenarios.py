"""
What the guests of the recordings do: played by the tests that make them, in the pretend way and in
the real one.

A scenario knows no device: the caller has one that QEMU has assigned, and says how another is
plugged in.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest

from lab.qemu_double import (
    KIB,
    MIB,
    ConfidentialGuest,
    GuestOptions,
    GuestStopped,
    TraceLine,
    VirtioMemDriver,
)

__all__ = ["SCENARIOS", "Scenario", "without_chance"]

_ROM = 0xC0000
_BORDER = 32 * MIB


class Scenario(NamedTuple):
    """A guest, and what it does."""

    options: GuestOptions
    play: Callable[[ConfidentialGuest, Callable[[], None]], None]
    """Gets the guest, and a function that has a second device come, or maps refused."""
    about: str


def _shapes(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """Conversions of all shapes: pages, ranges, parts, mixtures, and what is so already."""
    base, other = 2 * MIB, 8 * MIB
    for gpa, size, private in (
        (base, 4 * KIB, False),
        (base, 4 * KIB, True),
        (base, 64 * KIB, False),
        (base + 16 * KIB, 16 * KIB, True),
        (base, 64 * KIB, False),
        (base, 64 * KIB, True),
        *((other + page * 4 * KIB, 4 * KIB, False) for page in range(0, 8, 2)),
        (other, 32 * KIB, True),
        (other, 32 * KIB, False),
        (other, 32 * KIB, False),
        (other, 32 * KIB, True),
        (other, 32 * KIB, True),
        (128 * MIB, 4 * KIB, False),
    ):
        assert guest.convert(gpa, size, private=private) == 0


def _virtio_mem(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """Plugged, shared, unplugged while shared, plugged again."""
    driver = VirtioMemDriver(guest, 3 * MIB)
    base = driver.config().address
    driver.request_size(16 * MIB)
    driver.plug(base, 2)
    guest.convert(base, 64 * KIB, private=False)
    guest.convert(base + 8 * MIB, 64 * KIB, private=False)
    driver.plug(base + 8 * MIB, 1)
    driver.unplug(base, 1)
    driver.plug(base, 1)
    guest.convert(base, 4 * KIB, private=True)
    driver.unplug_all()


def _hot_plug(guest: ConfidentialGuest, plug: Callable[[], None]) -> None:
    """A second device comes when pages are shared, and goes."""
    guest.convert(2 * MIB, 64 * KIB, private=False)
    guest.convert(2 * MIB + 16 * KIB, 16 * KIB, private=True)
    plug()
    guest.convert(8 * MIB, 64 * KIB, private=False)
    guest.convert(8 * MIB, 4 * KIB, private=True)
    guest.unplug("second")
    guest.convert(8 * MIB, 64 * KIB, private=True)
    guest.convert(2 * MIB, 64 * KIB, private=True)


def _reset(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """Pages are shared when the guest is reset, and the next one converts as it likes."""
    guest.convert(2 * MIB, 64 * KIB, private=False)
    guest.reset()
    guest.convert(4 * MIB, 4 * KIB, private=False)
    guest.convert(4 * MIB, 4 * KIB, private=True)


def _border(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """Ranges over the border of RAM and pc.rom."""
    guest.convert(_ROM, 32 * KIB, private=False)
    guest.convert(_ROM - 32 * KIB, 64 * KIB, private=True)
    guest.convert(_ROM, 32 * KIB, private=True)
    guest.convert(_ROM - 32 * KIB, 64 * KIB, private=False)


def _two_backends(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """A range over the border of two NUMA backends, made private."""
    guest.convert(_BORDER - 64 * KIB, 64 * KIB, private=False)
    guest.convert(_BORDER, 64 * KIB, private=False)
    with pytest.raises(GuestStopped):
        guest.convert(_BORDER - 64 * KIB, 128 * KIB, private=True)


def _hole(guest: ConfidentialGuest, _: Callable[[], None]) -> None:
    """A hole is made private."""
    guest.convert(2 * MIB, 64 * KIB, private=False)
    with pytest.raises(GuestStopped):
        guest.convert(128 * MIB, 4 * KIB, private=True)


def _refused_map(guest: ConfidentialGuest, refuse: Callable[[], None]) -> None:
    """The fifth map of a conversion is refused."""
    guest.convert(2 * MIB, 64 * KIB, private=False)
    refuse()
    with pytest.raises(GuestStopped):
        guest.convert(4 * MIB, 64 * KIB, private=False)


_NODES = GuestOptions(nodes=(_BORDER, _BORDER))
_ALL: dict[str, tuple[GuestOptions, Callable[[ConfidentialGuest, Callable[[], None]], None]]] = {
    "clean": (GuestOptions(), _shapes),
    "virtio-mem": (GuestOptions(virtio_mem=32 * MIB), _virtio_mem),
    "hot-plug": (GuestOptions(root_ports=1), _hot_plug),
    "reset": (GuestOptions(resets=True), _reset),
    "border": (GuestOptions(), _border),
    "two-backends": (_NODES, _two_backends),
    "hole": (GuestOptions(), _hole),
    "refused-map": (GuestOptions(), _refused_map),
}
SCENARIOS = {
    name: Scenario(options, play, play.__doc__ or "") for name, (options, play) in _ALL.items()
}
"""By the name that is in those of the recordings."""

# Descriptors, addresses of the host, sockets, PCI addresses: others each time, or on each machine.
_CHANCE = re.compile(
    r"(?<=@)0x[0-9a-f]+|(?<=ua=)0x[0-9a-f]+|(?<=addr=)0x[0-9a-f]+(?= readonly)|(?<=src )0x[0-9a-f]+"
    r"|(?<=guest_memfd=)\d+|(?<=iommufd=)\d+|(?<=fd=)\d+|(?<=fd )\d+"
    r"|\b0000:[0-9a-f]{2}:[0-9a-f]{2}\.\d"
)


def without_chance(lines: Iterable[TraceLine]) -> list[str]:
    """Return the lines with a mark in place of all that depends on time, place and descriptors."""
    return [_CHANCE.sub("*", str(line)) for line in lines]
