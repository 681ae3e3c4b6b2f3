"""The kernel's numbers in the QEMU double's shim, against the headers of the lab's kernel."""

import os
import re
import subprocess
from pathlib import Path

from lab import double

_SHIM = Path(double.__file__).parent / "qemu_double/shim"
_HEADERS = ("linux/kvm.h", "linux/kvm_para.h", "linux/vfio.h", "linux/iommufd.h", "linux/psp-sev.h")
_IOCTL = re.compile(r"#define (\w+) IOC\((\d), (0x\w+|'.'), (0x\w+|\d+), (\d+)\)")
_ENUMERATOR = re.compile(r"\b((?:KVM|SEV)_\w+) = (\d+(?: << \d+)?)[,\s]")
# The shim's own, or in headers that programs do not get.
_WITHOUT_HEADER = {"SEV_STATE_INIT", "SEV_CONFIG_ES", "SEV_FEATURES_SNP_ACTIVE"}


def _numbers() -> dict[str, int]:
    """Read the shim's sources: the names are the kernel's."""
    found = {}
    for source in sorted(_SHIM.glob("*.[ch]")):
        text = source.read_text()
        for name, direction, kind, number, size in _IOCTL.findall(text):
            letter = ord(kind[1]) if kind.startswith("'") else int(kind, 16)
            value = int(direction) << 30 | int(size) << 16 | letter << 8 | int(number, 0)
            found[name] = value
        for name, value in _ENUMERATOR.findall(text):
            first, _, shift = value.partition(" << ")
            found[name] = int(first) << int(shift or "0")
    return found


def test_numbers_are_those_of_the_kernels_headers(tmp_path: Path) -> None:
    numbers = {name: n for name, n in _numbers().items() if name not in _WITHOUT_HEADER}
    prints = "".join(
        f'    printf("{name} %llu\\n", (unsigned long long)(unsigned)({name}));\n'
        for name in numbers
    )
    includes = "".join(f"#include <{header}>\n" for header in _HEADERS)
    program = tmp_path / "numbers.c"
    program.write_text(f"#include <stdio.h>\n{includes}int main(void)\n{{\n{prints}}}\n")
    headers = Path(os.environ["RAMBLOCK_LAB_HEADERS"]) / "include"
    subprocess.run(["gcc", "-I", headers, "-o", tmp_path / "numbers", program], check=True)
    printed = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True)
    by_kernel = {name: int(n) for name, n in (line.split() for line in printed.stdout.splitlines())}

    assert len(numbers) > 40
    assert numbers == by_kernel
