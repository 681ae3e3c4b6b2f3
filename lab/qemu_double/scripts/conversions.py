# SPDX-License-Identifier: Apache-2.0
"""
What QEMU does when a confidential guest converts pages, and what a device reaches then.

    python -m lab qemu -- lab/qemu_double/scripts/conversions.py
    python -m lab qemu --real -- lab/qemu_double/scripts/conversions.py
"""

from lab.qemu_double import KIB, MIB, ConfidentialGuest, Double
from lab.qemu_double.log import joined


def convert(guest: ConfidentialGuest, gpa: int, size: int, *, private: bool) -> None:
    """Convert; print the request and QEMU's steps."""
    answer = guest.convert(gpa, size, private=private)
    to = "private" if private else "shared"
    print(f"[{gpa:#x}, {gpa + size:#x}) to {to}: {answer}")
    for step in joined(guest.log.new()):
        print(f"    {step}")


with Double() as double:
    device = double.device()
    guest = double.guest(None, device)
    driver = device.driver(guest)
    guest.log.skip()
    print(f"QEMU's guest, the {double.way.value} way")
    convert(guest, 2 * MIB, 64 * KIB, private=False)
    print("a device reaches the page:", driver.reaches(2 * MIB))
    convert(guest, 2 * MIB, 32 * KIB, private=True)
    print("a device reaches the page:", driver.reaches(2 * MIB))
    convert(guest, 2 * MIB, 64 * KIB, private=False)
    print("a device reaches the page:", driver.reaches(2 * MIB))
