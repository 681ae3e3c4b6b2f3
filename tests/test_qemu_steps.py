"""How a difference between the table of QEMU's steps and a run is told."""

import pytest

from lab.qemu_double import TraceLine
from lab.qemu_double.log import joined
from qemu_steps import compare_steps


def test_calls_that_follow_each_other_are_one_step() -> None:
    texts = [
        ("kvm_hc_map_gpa_range", "gpa 0x1000 size 0x2000 attributes 0x0 flags 0x1"),
        ("vfio_user_dma_map", "iova 0x1000 size 0x1000 off 0x1000 flags 0x3 async_ops 0"),
        ("vfio_user_dma_map", "iova 0x2000 size 0x1000 off 0x2000 flags 0x3 async_ops 0"),
        ("vfio_user_dma_map", "iova 0x4000 size 0x1000 off 0x4000 flags 0x3 async_ops 0"),
        ("ram_block_discard_shared_range", "ram@0x7f0 + 0x1000: madvise: 1 fallocate: 1 ret: 0"),
    ]

    assert joined(TraceLine(n, *text) for n, text in enumerate(texts, 1)) == [
        "vfio_user_dma_map [0x1000, 0x3000) in 2 calls",
        "vfio_user_dma_map [0x4000, 0x5000) in 1 calls",
        "ram_block_discard_shared_range ram@HVA + 0x1000: madvise: 1 fallocate: 1 ret: 0",
    ]


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (["a", "b from 'x'"], ["a", "b from 'x'"], None),
        (["a", "b from 'x'"], ["a", "b from 'y'"], "step 2: word \"'x'\" of the table is \"'y'\""),
        (["a b"], ["a b c"], "step 1: one of them has more words"),
        (["a"], ["a", "b c"], "step 2: only QEMU has it: b c"),
        (["a", "b c"], ["a"], "step 2: only table has it: b c"),
    ],
)
def test_difference_is_named(expected: list[str], found: list[str], message: str | None) -> None:
    text = compare_steps(expected, found)

    assert text is None if message is None else text is not None and text.startswith(message)
