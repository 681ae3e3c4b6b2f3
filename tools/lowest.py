# SPDX-License-Identifier: Apache-2.0
"""
Print the lowest version of each runtime dependency that pyproject.toml allows, as pip constraints.

    python tools/lowest.py > constraints.txt

``make test-lowest`` installs these, so that a lower bound is a promise that somebody has tried.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# A bound without an upper one, or with one behind a comma; an extra in brackets.
_LOWEST = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<version>[\d.]+)(,<[\d.]+)?")


def lowest(requirements: list[str]) -> list[str]:
    """Turn ``name>=version`` into ``name==version``; ValueError for anything else."""
    pins = []
    for requirement in requirements:
        match = _LOWEST.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound of the form name>=version")
        pins.append(f"{match['name']}=={match['version']}")
    return pins


def main() -> None:
    """Print one constraint a line."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    sys.stdout.write("\n".join(lowest(project["dependencies"])) + "\n")


if __name__ == "__main__":
    main()
