"""`python -m lab qemu`, as somebody would run it: on this machine, and in the VM."""

import subprocess
import sys
from pathlib import Path

import pytest

from require import require_kvm

pytestmark = [pytest.mark.slow, require_kvm]

_REPOSITORY = Path(__file__).parents[3]
_SCRIPTS = "lab/qemu_double/scripts"


@pytest.mark.parametrize("way", [[], ["--real"]], ids=["pretend", "real"])
@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (
            "conversions.py",
            [
                "[0x200000, 0x210000) to shared: 0",
                "a device reaches the page: True",
                "[0x200000, 0x208000) to private: 0",
                "a device reaches the page: False",
                "[0x200000, 0x210000) to shared: 0",
                "a device reaches the page: True",
            ],
        ),
        (
            "reset.py",
            [
                "shared, and a device reaches it: True",
                "reset: all pages are private again; 0 unmaps",
                "private, and a device reaches it: True",
            ],
        ),
    ],
)
def test_script_shows_what_qemu_does(way: list[str], script: str, lines: list[str]) -> None:
    command = [sys.executable, "-m", "lab", "qemu", *way, "--", f"{_SCRIPTS}/{script}"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line in lines]
    assert printed == lines, done.stdout
