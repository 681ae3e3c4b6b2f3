"""
What the kernel's IOMMU driver says about faults, from its log.

Both drivers limit how often they say it (ten lines in five seconds), so a test that looks for a
fault makes few.
"""

import os

__all__ = ["FaultLog"]

# drivers/iommu/intel/dmar.c, dmar_fault_do_one(); drivers/iommu/amd/iommu.c,
# amd_iommu_report_page_fault() and iommu_print_event(). The address in AMD's line is that of the
# emulated event, 0.
_FAULTS = (b"[DMA Read", b"[DMA Write", b"IO_PAGE_FAULT")
_RECORD_BYTES = 8192


class FaultLog:
    """Sees the faults from its creation on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def take(self) -> list[str]:
        """Take the lines about faults since the last time."""
        lines: list[str] = []
        while True:
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                continue  # older records were overwritten; the next read gives what is there
            if any(mark in record for mark in _FAULTS):
                lines.append(record.partition(b";")[2].decode(errors="replace").strip())

    def close(self) -> None:
        os.close(self._fd)
