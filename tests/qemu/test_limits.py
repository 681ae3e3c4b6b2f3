"""The planner's copy of QEMU's own check: the largest guest that QEMU starts, and the next one."""

import pytest

from lab.qemu_double import KIB, MIB, Double, GuestOptions, QemuEnded
from message_samples import explained
from ramblock.plan.guest import Guest, Pluggable
from ramblock.plan.limits import Limits
from ramblock.plan.qemu_check import check_as_qemu

_FIRMWARE = 64 * KIB
# QEMU rounds -m up to it: with another size it says that memory and backend differ.
_STEP = 8 * KIB
_LAYOUTS = {
    "one backend": (1, 0),
    "two nodes": (2, 0),
    "four nodes": (4, 0),
    "virtio-mem": (1, 16 * MIB),
}


def _passes(memory: int, nodes: int, pluggable: int) -> bool:
    virtio_mem = Pluggable(pluggable) if pluggable else None
    guest = Guest(memory=memory, numa_nodes=nodes, virtio_mem=virtio_mem)
    limits = Limits()
    check = check_as_qemu(guest, limits.server_maps, limits.memslots, firmware=_FIRMWARE)
    return check.passes


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_the_largest_guest_that_starts_is_the_one_that_the_plan_names(
    double: Double, layout: str
) -> None:
    nodes, pluggable = _LAYOUTS[layout]
    step = _STEP * nodes
    most = next(
        memory
        for memory in range(128 * MIB // step * step, 0, -step)
        if _passes(memory, nodes, pluggable)
    )

    def options(memory: int) -> GuestOptions:
        shares = (memory // nodes,) * nodes if nodes > 1 else ()
        return GuestOptions(memory=memory, nodes=shares, virtio_mem=pluggable)

    double.guest(options(most), double.vfio_user_device())
    with pytest.raises(QemuEnded, match="possibly running out of DMA mappings") as caught:
        double.guest(options(most + step), double.vfio_user_device())
    assert "qemu-few-mappings" in explained(caught.value.output)
    for number in (Limits().server_maps, Limits().memslots):
        assert str(number) in caught.value.output
