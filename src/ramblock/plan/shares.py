# SPDX-License-Identifier: Apache-2.0
"""
The memory that a guest shares, piece by piece, with the reason for each number.

Where the number follows from a kernel's source it says which. Where it does not (the staging
buffers of a GPU's driver, say) it is *assumed*, the range is wide, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ramblock.plan.guest import Guest, Profile, Technology
from ramblock.plan.span import Span
from ramblock.plan.swiotlb import swiotlb_bytes
from ramblock.units import GIB, KIB, MIB, PAGE_SIZE

__all__ = [
    "Share",
    "boot_shares",
    "buffer_room",
    "buffers",
    "conversion_rate",
    "firmware",
    "later_shares",
]

_NONE = Span.exactly(0)
_LARGEST_CHUNK = 4 * MIB  # MAX_PAGE_ORDER: the largest piece that the page allocator hands out

_MOST_BUFFERS = 192 * MIB
_LARGEST_BUFFER = 2 * MIB


class Share(msgspec.Struct, frozen=True):
    """Memory that is shared for one purpose."""

    name: str
    size: Span
    """Bytes; whole pages."""
    requests: Span
    """How many requests of the guest make it shared; each is one contiguous range."""
    why: str
    assumed: bool = False
    """Whether the numbers are a guess."""


def boot_shares(guest: Guest) -> list[Share]:
    """List the memory that is shared when the guest is up, and stays so."""
    return [
        Share(
            "SWIOTLB pool",
            swiotlb_bytes(guest.memory, guest.vcpus),
            Span.exactly(1),
            "6 % of RAM, 64 MiB to 1 GiB (arch/x86/mm/mem_encrypt.c);"
            " rounded up to a power of two since Linux 6.0 (kernel/dma/swiotlb.c)",
        ),
        _atomic_pools(guest),
        *_per_cpu(guest),
        Share(
            "queues of the VMM's devices",
            Span.between(16 * PAGE_SIZE, 128 * PAGE_SIZE),
            Span.between(4, 16),
            "virtqueues of console, disk, vsock and the like",
            assumed=True,
        ),
        *(
            share
            for number, profile in enumerate(guest.devices)
            for share in _rings(guest, profile, number)
        ),
    ]  # fmt: skip


def _atomic_pools(guest: Guest) -> Share:
    """DMA pools for atomic contexts, one per zone (dma_atomic_pool_init(), kernel/dma/pool.c)."""
    wanted = max(guest.memory // (GIB // (128 * KIB)), 128 * KIB)
    one = min(1 << (wanted - 1).bit_length(), _LARGEST_CHUNK)
    pools = Span.between(2, 3)  # the zones DMA and DMA32; NORMAL, where there is memory above 4 GiB
    return Share(
        "pools for atomic DMA",
        pools.each(lambda count: count * one),
        pools,
        "128 KiB for each GiB of RAM, at most 4 MiB, once for each zone (kernel/dma/pool.c)",
    )


def _per_cpu(guest: Guest) -> Iterator[Share]:
    if guest.technology is Technology.SNP:
        pages = Span.between(guest.vcpus, 4 * guest.vcpus)
        yield Share(
            "GHCBs and KVM's clocks",
            pages.each(lambda count: count * PAGE_SIZE),
            pages,
            "a GHCB for each vCPU, and KVM's clocks (arch/x86/coco/sev, arch/x86/kernel/kvm.c)",
        )


def _rings(guest: Guest, profile: Profile, number: int) -> Iterator[Share]:
    name = f"{profile} {number + 1}"
    if profile is Profile.NVME:
        # A queue pair for each processor, if the device has as many: 1024 entries of 64 and of 16
        # bytes; the admin queue has 32.
        queues = Span.between(1, guest.vcpus)
        yield Share(
            f"{name}: queues",
            queues.each(lambda count: count * 80 * KIB + 2 * PAGE_SIZE),
            queues.each(lambda count: 2 * count + 2),
            "64 KiB and 16 KiB for each queue pair (drivers/nvme/host/pci.c)",
        )
    elif profile is Profile.NIC:
        queues = Span.between(1, min(guest.vcpus, 64))
        yield Share(
            f"{name}: rings",
            Span(
                queues.low * 64 * KIB,
                queues.expected * 128 * KIB,
                queues.high * 512 * KIB,
            ),
            Span(queues.low * 2, queues.expected * 3, queues.high * 4),
            "descriptor rings, 64 to 512 KiB for each queue",
            assumed=True,
        )
    elif profile is Profile.GPU_CC:
        yield Share(
            f"{name}: channels",
            Span.between(8 * MIB, 32 * MIB),
            Span.between(16, 48),
            "command buffers that the driver makes when it starts",
            assumed=True,
        )


def later_shares(guest: Guest) -> list[Share]:
    """List the memory that may be shared besides while the guest runs."""
    shares = [
        Share(
            f"{profile} {number + 1}: staging buffers",
            Span(0, 64 * MIB, 512 * MIB),
            Span(0, 32, 256),
            "what a job copies to and from the GPU goes through shared memory",
            assumed=True,
        )
        for number, profile in enumerate(guest.devices)
        if profile is Profile.GPU_CC
    ]
    if guest.dynamic_swiotlb:
        # Nothing but memory ends the growth.
        most = guest.most_memory // _LARGEST_CHUNK * _LARGEST_CHUNK
        likely = min(most, swiotlb_bytes(guest.memory, guest.vcpus).expected)
        growth = Span(0, likely // _LARGEST_CHUNK * _LARGEST_CHUNK, most)
        shares.append(
            Share(
                "SWIOTLB growth",
                growth,
                growth.each(lambda size: size // _LARGEST_CHUNK),
                "pools of at most 4 MiB whenever the bounce buffers are used up,"
                " without a limit (CONFIG_SWIOTLB_DYNAMIC)",
            )
        )
    return shares


def buffers(guest: Guest) -> Share:
    """
    Describe the memory shared by the conversions after boot.

    None of it where there are no such conversions.
    """
    room = buffer_room(guest)
    return Share(
        "DMA buffers that come and go",
        Span.between(0, room),
        Span(
            0,
            min(-(-guest.conversions // 2), -(-room // MIB)),
            min(guest.conversions, room // PAGE_SIZE),
        ),
        "the conversions after boot: buffers of 4 KiB to 2 MiB",
        assumed=True,
    )


def buffer_room(guest: Guest) -> int:
    """
    Tell how many bytes are in such buffers at most.

    :mod:`~ramblock.plan.workload` keeps to it.
    """
    room = guest.memory // 8 // (2 * PAGE_SIZE) * (2 * PAGE_SIZE)
    return min(_MOST_BUFFERS, room, guest.conversions * _LARGEST_BUFFER)


def firmware() -> Share:
    """
    Describe the buffers that firmware shares for one request each, and takes back.

    None stays.
    """
    requests = Span(0, 2_500, 5_000)
    return Share(
        "firmware's buffers",
        Span(0, requests.expected * 4 * PAGE_SIZE, requests.high * 8 * PAGE_SIZE),
        requests,
        "about 5,000 in a boot through grub, most below 32 KiB (tianocore/edk2 PR 3709);"
        " none with a kernel that the VMM loads",
        assumed=True,
    )


_RATES = {
    Profile.NIC: Span(0, 1, 10),
    Profile.NVME: Span(0, 1, 10),
    Profile.GPU_CC: Span(0, 20, 1_000),
    Profile.NONE: _NONE,
}


def conversion_rate(guest: Guest) -> Span:
    """
    Tell how many conversions per second to expect after boot.

    Assumed, unless the guest says so.
    """
    if guest.rate is not None:
        return guest.rate
    rate = _NONE
    for profile in guest.devices:
        rate += _RATES[profile]
    return rate
