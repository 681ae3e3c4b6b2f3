"""
A QEMU of the lab as somebody else's VMM: a Linux guest with a virtio-mem device, and a vfio-user
device on a probe's socket.

The guest writes its marker over and over into files in memory. What is plugged comes online as
movable, so that is where the files are, as far as they fit.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from qemu.qmp import QMPClient

from initramfs import write_initramfs

__all__ = ["BASE_SIZE", "BLOCK_SIZE", "MAX_SIZE", "REGION", "Qmp", "qemu_command"]

BASE_SIZE = 512 << 20
"""Bytes of ordinary RAM; all of it below 4 GiB."""
REGION = 1 << 32
"""Where QEMU puts the virtio-mem device."""
MAX_SIZE = 1 << 30
"""Bytes that can be plugged."""
BLOCK_SIZE = 2 << 20

_DEVICE = "vm0"
_SCRIPT = """\
mount -t proc proc /proc
mount -t tmpfs -o size=90% tmpfs /tmp
marker=$(sed 's/.*marker=//; s/ .*//' /proc/cmdline)
echo "the guest is up, its marker is $marker"
while true; do
    for file in a b; do
        yes "$marker" | head -c 12000000 > /tmp/$file
        sleep 1
    done
done
"""


def qemu_command(folder: Path, probe_socket: Path, marker: str, *more: str) -> list[str]:
    """
    Return the command; the lab tells the programs by the environment.

    :param folder: For what the guest needs; QEMU listens at ``qmp`` in it, twice.
    :param more: Other arguments.
    """
    initramfs = folder / "initramfs"
    write_initramfs(initramfs, Path(os.environ["RAMBLOCK_LAB_BUSYBOX"]), _SCRIPT)
    memory = "memory-backend-memfd,share=on"
    return [
        os.environ["RAMBLOCK_LAB_QEMU"],
        *("-accel", "tcg", "-machine", "q35,memory-backend=ram", "-cpu", "max"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-m", f"{BASE_SIZE >> 20}M,maxmem=4G,slots=2"),
        *("-object", f"{memory},id=ram,size={BASE_SIZE}"),
        *("-object", f"{memory},id=pluggable,size={MAX_SIZE}"),
        *("-device", f"virtio-mem-pci,id={_DEVICE},memdev=pluggable,block-size={BLOCK_SIZE}"),
        "-device",
        f'{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{probe_socket}"}}}}',
        *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
        *("-qmp", f"unix:{folder}/qmp-probe,server=on,wait=off"),
        *("-kernel", os.environ["RAMBLOCK_LAB_KERNEL"], "-initrd", str(initramfs)),
        *("-append", f"console=ttyS0 panic=-1 memhp_default_state=online_movable marker={marker}"),
        *more,
    ]


class Qmp:
    """
    What the test says to QEMU and asks of it.

    QEMU's own protocol, its own package, one call at a time.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self._runner = asyncio.Runner()
        self._client = QMPClient("test")
        self._client.logger.setLevel("CRITICAL")  # until QEMU listens there is nobody to connect to
        deadline = monotonic() + timeout
        while True:
            try:
                self._runner.run(self._client.connect(str(path)))
                return
            except Exception:
                if monotonic() > deadline:
                    self._runner.close()
                    raise
                sleep(0.1)

    def __enter__(self) -> "Qmp":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self._client.disconnect())
        finally:
            self._runner.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Carry out a command; return its answer."""
        return self._runner.run(self._client.execute(command, arguments))

    def request(self, size: int) -> None:
        """Ask the guest to have *size* bytes plugged."""
        path = f"/machine/peripheral/{_DEVICE}"
        self.execute("qom-set", path=path, property="requested-size", value=size)

    def plugged(self) -> int:
        """Return how many bytes are."""
        (device,) = self.execute("query-memory-devices")
        assert device["data"]["memaddr"] == REGION
        assert device["data"]["max-size"] == MAX_SIZE
        size: int = device["data"]["size"]
        return size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the guest meanwhile: its memory stays as it is."""
        self.execute("stop")
        try:
            yield
        finally:
            self.execute("cont")

    def memory(self, address: int, size: int, path: Path) -> bytes:
        """Return guest memory as QEMU sees it, by way of a file."""
        self.execute("pmemsave", val=address, size=size, filename=str(path))
        return path.read_bytes()
