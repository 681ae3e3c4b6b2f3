"""
A guest's whole file system in one file: busybox, and a script as its first program (the kernel's
"newc" cpio format).
"""

import gzip
import stat
from pathlib import Path

__all__ = ["write_initramfs"]

_FOLDERS = ("bin", "dev", "proc", "sys", "tmp")
_CONSOLE = (5, 1)


def write_initramfs(path: Path, busybox: Path, script: str) -> None:
    """Write it to *path*; *script* is for busybox's shell, which finds all its commands."""
    init = f"#!/bin/busybox sh\n/bin/busybox --install /bin\nexport PATH=/bin\n{script}"
    members = [
        *(_member(name, stat.S_IFDIR | 0o755) for name in _FOLDERS),
        _member("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE),
        _member("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        _member("init", stat.S_IFREG | 0o755, init.encode()),
        _member("TRAILER!!!", 0),
    ]
    path.write_bytes(gzip.compress(b"".join(members), compresslevel=1))


def _member(
    name: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)
) -> bytes:
    # Documentation/driver-api/early-userspace/buffer-format.rst: ino, mode, uid, gid, nlink, mtime,
    # filesize, major and minor of the device it is on, those of the device it is, namesize, check;
    # each as eight hex digits.
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
