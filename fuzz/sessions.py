# SPDX-License-Identifier: Apache-2.0
"""
Play hostile sessions against a probe in a process of its own, and against the client.

    make fuzz                       # for FUZZ_SECONDS
    .venv/bin/python fuzz/sessions.py --messages 1000000

The sessions are those of tests/hostile_sessions.py. The probe must not end, must serve another
client after each hundred of them, and must grow neither in memory nor in descriptors. The client's
calls must end. A seed that breaks it is told.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, sleep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile_sessions import Files, play_client, play_server, use_target
from ramblock import RamBlock
from ramblock.dma import HostRange, VfioUserTarget

__all__ = ["main"]

_SESSIONS_PER_LOOK = 100
# A page table, a cache: it settles. A leak of 100 bytes for each message would be more.
_GROWTH_BYTES = 24 << 20
# The command, with the patience of a test.
_PROBE = """
import sys
from ramblock.probe import session
session._TIMEOUT_SECONDS = 0.1
from ramblock.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def main() -> int:
    """Play both roles; return 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1 << 62, help="in each role")
    parser.add_argument("--seconds", type=float, default=1e9, help="in each role")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    if not any(word.startswith(("--messages", "--seconds")) for word in sys.argv[1:]):
        arguments.seconds = 60
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, Files() as files:
        broken = _play_clients(Path(folder), files, arguments)
        broken = _play_servers(files, arguments) or broken
    return 1 if broken else 0


def _play_clients(folder: Path, files: Files, arguments: argparse.Namespace) -> bool:
    path, errors = folder / "probe.sock", folder / "errors"
    words = ["probe", "--socket", str(path), "--touch", "--scribble", "--quiet"]
    words += ["--trace", "/dev/null"]
    with errors.open("wb") as stderr:
        probe = subprocess.Popen(
            [sys.executable, "-c", _PROBE, *words], stderr=stderr, stdout=subprocess.DEVNULL
        )
    try:
        return _play_clients_of(probe, path, errors, files, arguments)
    finally:
        probe.terminate()
        probe.wait(60)


def _play_clients_of(
    probe: subprocess.Popen[bytes],
    path: Path,
    errors: Path,
    files: Files,
    arguments: argparse.Namespace,
) -> bool:
    while not path.exists():
        sleep(0.05)
    end = monotonic() + arguments.seconds
    messages, seed = 0, arguments.first
    first: tuple[int, int] | None = None
    last = (0, 0)
    while messages < arguments.messages and monotonic() < end:
        for _ in range(_SESSIONS_PER_LOOK):
            messages += play_client(path, seed, files)
            seed += 1
            if probe.poll() is not None or errors.stat().st_size:
                _say(f"seed {seed - 1}: the probe fails:\n{errors.read_text()}")
                return True
        target = VfioUserTarget(path, timeout=30)
        target.device_info()
        target.close()
        last = _size_of(probe.pid)
        first = first or last
    assert first is not None
    _say(
        f"probe: {messages:,} messages in {seed - arguments.first:,} sessions;"
        f" {first[0] >> 10:,} KiB and {first[1]} descriptors at first,"
        f" {last[0] >> 10:,} KiB and {last[1]} at last"
    )
    return last[0] > first[0] + _GROWTH_BYTES or last[1] > first[1] + 8


def _size_of(pid: int) -> tuple[int, int]:
    """Tell a process's resident bytes, and its descriptors."""
    folder = Path(f"/proc/{pid}")
    pages = int((folder / "statm").read_text().split()[1])
    return pages * 4096, len(list((folder / "fd").iterdir()))


def _play_servers(files: Files, arguments: argparse.Namespace) -> bool:
    end = monotonic() + arguments.seconds
    messages = failed = 0
    with RamBlock.create("ram", 4096) as block:
        memory = HostRange(block.fd, 0, block.address, 4096)
        for seed in itertools.count(arguments.first):
            ours, theirs = socket.socketpair()
            counts: list[int] = []
            thread = threading.Thread(target=_count, args=(counts, theirs, seed, files))
            thread.start()
            target = use_target(ours, seed, memory)
            thread.join(60)
            if not counts:
                _say(f"seed {seed}: the server's side does not end, or fails")
                return True
            messages += counts[0]
            failed += target is None or target.failure is not None
            if messages >= arguments.messages or monotonic() > end:
                break
    _say(
        f"client: {messages:,} messages in {seed - arguments.first + 1:,} sessions, {failed:,} lost"
    )
    return False


def _count(counts: list[int], sock: socket.socket, seed: int, files: Files) -> None:
    counts.append(play_server(sock, seed, files))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
