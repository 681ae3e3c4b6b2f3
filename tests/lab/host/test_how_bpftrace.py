"""
The script of `ramblock check --how bpftrace`, as it is printed: bpftrace compiles it.

The lab's kernel has no BPF, so nothing is recorded with it here; tests/trace reads what it prints.
"""

import os
import subprocess
from pathlib import Path

from lab.recorders import RECORDERS_VARIABLE
from ramblock.cli.check_how import RECIPES
from require import require_root


@require_root
def test_bpftrace_compiles_the_script(tmp_path: Path) -> None:
    before, _ = RECIPES["bpftrace"].start.split("\n# Before the guest starts")
    subprocess.run(["sh", "-e", "-c", before], cwd=tmp_path, check=True)
    bpftrace = Path(os.environ[RECORDERS_VARIABLE]) / "bpftrace"

    done = subprocess.run(
        [bpftrace, "--emit-elf", "vfio.elf", "vfio.bt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "vfio.elf").read_bytes().startswith(b"\x7fELF")
