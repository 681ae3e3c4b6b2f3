# SPDX-License-Identifier: Apache-2.0
"""
Fuzz the vfio-user protocol, both roles, with what the coverage shows (atheris, libFuzzer).

    make fuzz                       # a minute
    make fuzz FUZZ_SECONDS=3600

What has to hold is in tests/hostile_peer.py, which the tests play as well. An input that breaks it
is kept in build/fuzz/ and can be given as an argument, to see it again: ``.venv/bin/python
fuzz/vfio_user.py build/fuzz/crash-...``.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

with atheris.instrument_imports(include=["ramblock"]):
    from hostile_peer import QUESTIONS, play_bytes
    from ramblock.dma.vfio_user.numbers import FROM_SERVER

__all__ = ["main", "play", "seeds"]


def seeds() -> list[bytes]:
    """List inputs to begin with: what a well-behaved peer sends, in the words of ``play_bytes``."""
    found = []
    for server, from_server in ((1, False), (0, True)):
        whole = bytes([server | 2])
        for number, question in enumerate(QUESTIONS):
            payload = question.pack()
            if (question.command in FROM_SERVER) is from_server:
                # A message: command, flags, id, payload, errno; then an answer to it.
                whole += bytes([2, question.command, 0, number, len(payload)]) + payload + bytes(1)
                whole += bytes([6, number])
            else:
                whole += bytes([4, number])
        found.append(whole + b"\xff")
    version = struct.pack("=HHIIIHH", 1, 1, 20, 0, 0, 0, 0)
    found.append(bytes([1, 0, len(version)]) + version + bytes([0, 6, 3]))
    return found


def play(data: bytes) -> None:
    """Play one input; what it breaks is an exception."""
    play_bytes(data)


def main() -> None:
    """Run libFuzzer, with its own options and corpus folders on the command line."""
    folders = [Path(word) for word in sys.argv[1:] if Path(word).is_dir()]
    if folders and not any(folders[0].iterdir()):
        for number, seed in enumerate(seeds()):
            (folders[0] / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, play)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
