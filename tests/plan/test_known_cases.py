"""
Cases whose numbers are known from elsewhere: bug reports, kernel sources, arithmetic done by hand.
"""

import pytest

from ramblock.dma.target import MappingPolicy
from ramblock.plan import (
    Guest,
    GuestPlan,
    Limits,
    Pluggable,
    Profile,
    Row,
    Technology,
    Verdict,
    plan_guest,
)
from ramblock.plan.formula import pages
from ramblock.plan.qemu_check import check_as_qemu
from ramblock.plan.swiotlb import swiotlb_bytes
from ramblock.plan.targets import POLICIES
from ramblock.units import GIB, KIB, MIB

_KATA = Guest(memory=16 * GIB, devices=(Profile.GPU_CC,))


@pytest.fixture(scope="module")
def kata() -> GuestPlan:
    return plan_guest(_KATA, Limits())


def _row(plan: GuestPlan, policy: str, target: str) -> Row:
    (found,) = (each for each in plan.rows if (each.policy, each.target) == (policy, target))
    return found


def test_a_tdx_guest_with_a_gpu_is_refused_by_type1(kata: GuestPlan) -> None:
    """kata-containers #11721."""
    row = _row(kata, "page", "type1")
    assert row.verdict is Verdict.REFUSED
    (room,) = row.headroom
    assert (room.limit, room.fails_at) == (65_535, 256 * MIB)
    assert "256 MiB of shared memory (SWIOTLB pool" in row.why
    assert room.left < 0


def test_what_helps_it_is_named(kata: GuestPlan) -> None:
    assert kata.advice[0].target == "iommufd-cutting"
    assert kata.advice[1].target == "iommufd"
    (limit,) = (each for each in kata.advice if "dma_entry_limit" in each.setting)
    assert limit.number is not None
    assert f"dma_entry_limit={limit.number}" in limit.setting
    again = plan_guest(_KATA, Limits(dma_entry_limit=limit.number))
    row = _row(again, "page", "type1")
    assert row.verdict is Verdict.FITS
    assert row.qemu is not None
    assert row.qemu.passes


def test_every_number_that_is_advised_is_enough(kata: GuestPlan) -> None:
    numbers = {each.target: each.number for each in kata.advice if "swiotlb" not in each.setting}
    limits = Limits(
        dma_entry_limit=numbers["type1"] or 0,
        max_iotlb_entries=numbers["vhost-vdpa"] or 0,
        server_maps=numbers["vfio-user"] or 0,
    )
    again = plan_guest(_KATA, limits)
    assert {row.verdict for row in again.rows} == {Verdict.FITS, Verdict.IMPOSSIBLE}
    assert again.advice == []


def test_with_the_pool_that_is_advised_it_comes_up(kata: GuestPlan) -> None:
    (advice,) = (each for each in kata.advice if "swiotlb=" in each.setting)
    assert advice.number is not None
    others = sum(share.size.high for share in kata.boot_shares if share.name != "SWIOTLB pool")
    assert pages(advice.number * 2 * KIB + others) <= 65_535


def test_runs_are_tens_at_boot(kata: GuestPlan) -> None:
    """
    One for each request.

    TDX hands the pool over in 512 slices of 2 MiB, each a conversion of its own, and SNP in 8.
    """
    row = _row(kata, "run", "iommufd-cutting")
    assert row.need is not None
    assert row.verdict is Verdict.FITS
    assert 10 <= row.need.boot_entries.low < 100
    assert 512 <= row.need.boot_entries.expected < 600
    snp = Guest(memory=16 * GIB, devices=(Profile.GPU_CC,), technology=Technology.SNP)
    row = _row(plan_guest(snp, Limits()), "run", "iommufd-cutting")
    assert row.need is not None
    assert row.need.boot_entries.expected < 100


def test_conversions_fragment_runs() -> None:
    """Each adds a mapping at most."""
    found = []
    for conversions in (0, 100, 10_000):
        guest = Guest(memory=16 * GIB, devices=(Profile.GPU_CC,), conversions=conversions)
        need = _row(plan_guest(guest, Limits()), "run", "iommufd-cutting").need
        assert need is not None
        found.append(need.peak_entries.high)
    assert found[0] < found[1] < found[2]
    assert found[2] >= 10_000


@pytest.mark.parametrize(
    ("memory", "least"),
    [
        (GIB, 64 * MIB),  # 6 % are less than the least
        (4 * GIB, 62_914 * 4 * KIB),
        (8 * GIB, 125_829 * 4 * KIB),
        (16 * GIB, 251_658 * 4 * KIB),
        (2048 * GIB, GIB),
    ],
)
def test_swiotlb(memory: int, least: int) -> None:
    assert swiotlb_bytes(memory, 4).low == least


def test_swiotlb_alone_crosses_the_limit_just_above_4_17_gib() -> None:
    assert pages(swiotlb_bytes(int(4.166 * GIB), 4).low) <= 65_535
    assert pages(swiotlb_bytes(int(4.167 * GIB), 4).low) > 65_535
    # Linux since 6.0 rounds up, and there it is 256 MiB from 2 GiB on.
    assert pages(swiotlb_bytes(int(2.08 * GIB), 4).high) <= 65_535
    assert pages(swiotlb_bytes(int(2.09 * GIB), 4).high) == 65_536


def test_swiotlb_is_at_its_most_from_16_7_gib_on() -> None:
    assert swiotlb_bytes(int(16.66 * GIB), 4).low < GIB
    assert swiotlb_bytes(int(16.67 * GIB), 4).low == GIB
    assert swiotlb_bytes(1 << 44, 512).high == GIB


@pytest.mark.parametrize(
    ("adjusted", "areas", "rounded"),
    [(245, 1, 256), (245, 64, 256), (983, 4, 1024), (512, 4, 512), (64, 512, 128)],
)
def test_swiotlb_is_rounded_up(adjusted: int, areas: int, rounded: int) -> None:
    """
    As the kernel says: "bounce buffer size adjusted to 245MB", "roundup to 256MB".

    An area has 256 KiB at least.
    """
    memory = adjusted * MIB * 100 // 6
    assert swiotlb_bytes(memory, areas).high == rounded * MIB


def test_vdpa_has_8_mib(kata: GuestPlan) -> None:
    (room,) = _row(kata, "page", "vhost-vdpa").headroom
    assert room.limit == 2_048
    assert room.fails_at == 8 * MIB + 4 * KIB
    assert room.verdict is Verdict.REFUSED


def test_qemus_own_check() -> None:
    """The kata case: limit 65,535, 32,764 slots; sections below and above 4 GiB, the firmware's."""
    check = check_as_qemu(_KATA, 65_535, 32_764)
    assert (check.granules, check.listeners) == (4_194_304 + 1_024, 3)
    assert check.needed == 4_194_304 + 1_024 + 32_764 - 3
    assert not check.passes
    # The number of Intel's cover letter is that of the pages; the slots come on top of it.
    assert not check_as_qemu(_KATA, 4_194_304, 32_764).passes
    assert check_as_qemu(_KATA, check.needed, 32_764).passes
    assert not check_as_qemu(_KATA, check.needed - 1, 32_764).passes


def test_qemu_checks_type1_and_vfio_user_and_no_other(kata: GuestPlan) -> None:
    checked = {row.target for row in kata.rows if row.qemu is not None}
    assert checked == {"type1", "vfio-user"}


def test_qemu_counts_each_node_and_what_can_be_plugged() -> None:
    guest = Guest(memory=16 * GIB, numa_nodes=4, virtio_mem=Pluggable(8 * GIB))
    check = check_as_qemu(guest, 65_535, 32_764)
    assert check.listeners == 1 + 4 + 1 + 1
    assert check.granules == pages(24 * GIB) + 1_024


def test_qemu_counts_nodes_below_4_gib_too() -> None:
    assert Guest(memory=2 * GIB, numa_nodes=2).sections() == [GIB, GIB]
    assert Guest(memory=16 * GIB, numa_nodes=4).sections() == [
        2 * GIB,
        2 * GIB,
        4 * GIB,
        4 * GIB,
        4 * GIB,
    ]
    assert Guest(memory=16 * GIB, numa_nodes=8).sections() == [2 * GIB] * 8


def test_qemu_places_what_fits_below_4_gib_there() -> None:
    assert Guest(memory=2560 * MIB).sections() == [2560 * MIB]
    assert Guest(memory=2816 * MIB).sections() == [2 * GIB, 768 * MIB]


def test_qemu_adds_up_in_32_bits() -> None:
    check = check_as_qemu(Guest(memory=16 << 40), 65_535, 32_764)
    assert check.needed > 1 << 32
    assert check.passes


def test_a_smaller_pool_is_advised_only_where_it_is_one() -> None:
    """Not where boot fits as it is, nor where the areas of all processors need more."""
    for guest in (
        Guest(memory=4 * GIB, devices=(Profile.GPU_CC,)),
        Guest(memory=16 * GIB, vcpus=2048),
    ):
        limit = 200_000 if guest.memory == 4 * GIB else 65_535
        plan = plan_guest(guest, Limits(dma_entry_limit=limit))
        assert not any("swiotlb=" in each.setting for each in plan.advice)


def test_only_targets_that_cut_take_runs(kata: GuestPlan) -> None:
    possible = {row.target for row in kata.rows if row.policy == "run" and row.need is not None}
    assert possible == {"iommufd-cutting"}


def test_the_policies_are_those_of_the_mapper() -> None:
    assert {*POLICIES, MappingPolicy.AUTO} == set(MappingPolicy)
