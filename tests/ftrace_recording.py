"""The kernel's events of a while, as `ramblock check --how ftrace` says, in a text file."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["recorded"]

_TRACEFS = Path("/sys/kernel/tracing")
_EVENTS = (
    "iommu/map",
    "iommu/unmap",
    "iommu/attach_device_to_domain",
    "iommu/io_page_fault",
    "kvm/kvm_vm_set_mem_attributes",
    "kvm/kvm_hypercall",
    "kvm/kvm_entry",
)
_BUFFER_KIB = 65_536


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Record what `ramblock check --how ftrace` says, in a buffer of its own; write it as text."""
    folder = _TRACEFS / "instances" / "ramblock-record"
    folder.mkdir()
    try:
        (folder / "options" / "record-tgid").write_text("1")
        (folder / "trace_clock").write_text("mono")
        (folder / "buffer_size_kb").write_text(str(_BUFFER_KIB))
        for event in _EVENTS:
            (folder / "events" / event / "enable").write_text("1")
        try:
            yield
        finally:
            (folder / "tracing_on").write_text("0")
        for stats in folder.glob("per_cpu/cpu*/stats"):
            assert "overrun: 0\n" in stats.read_text(), stats.read_text()
        with (folder / "trace").open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    finally:
        folder.rmdir()
