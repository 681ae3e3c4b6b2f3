"""What GNU binutils make of machine code."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["disassemble", "needs_objdump"]

_OBJDUMP = shutil.which("objdump")

needs_objdump = pytest.mark.skipif(
    _OBJDUMP is None, reason="no objdump; install GNU binutils (apt-get install binutils)"
)


def disassemble(code: bytes) -> list[str]:
    """Give each 64-bit instruction of *code* in Intel's syntax, without spaces and comments."""
    assert _OBJDUMP is not None
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(code)
        options = ("-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "-w")
        done = subprocess.run(
            [_OBJDUMP, *options, file.name], check=True, capture_output=True, text=True
        )
    lines = re.findall(r"^ +[0-9a-f]+:\t[0-9a-f ]+\t(.*)$", done.stdout, re.MULTILINE)
    return [line.partition("#")[0].replace(" ", "") for line in lines]
