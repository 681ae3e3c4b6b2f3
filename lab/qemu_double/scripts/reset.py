# SPDX-License-Identifier: Apache-2.0
"""
A confidential guest is reset: its shared pages become private, and a device still reaches them.

    python -m lab qemu -- lab/qemu_double/scripts/reset.py
    python -m lab qemu --real -- lab/qemu_double/scripts/reset.py
"""

from lab.qemu_double import KIB, MIB, Double, GuestOptions

with Double() as double:
    device = double.device()
    guest = double.guest(GuestOptions(resets=True), device)
    guest.convert(2 * MIB, 64 * KIB, private=False)
    print("shared, and a device reaches it:", device.driver(guest).reaches(2 * MIB))
    guest.log.skip()
    guest.reset()
    unmaps = [line for line in guest.log.new() if line.name.endswith(("dma_unmap", "unmap_dma"))]
    print(f"reset: all pages are private again; {len(unmaps)} unmaps")
    print("private, and a device reaches it:", device.driver(guest).reaches(2 * MIB))
