# SPDX-License-Identifier: Apache-2.0
"""
Packages of a newer Debian than the machine has, fetched with apt-get and unpacked, never installed.

apt-get works in a folder of the cache: with its own lists, its own source, and a status file that
says that nothing is installed, so that the dependencies of a package come complete. The system's
package state is neither read nor changed; its settings (proxies, for instance) and its archive keys
count as always. Being root is not needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from lab.errors import LabError
from lab.shell import Shell

__all__ = ["Archive", "Package", "mirror_from"]

_SUITE = "trixie"
# The first with a QEMU and a kernel that the lab can use; a suite's archive stays when the next one
# comes.
_BACKPORTS = f"{_SUITE}-backports"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Where apt has no Debian archive of its own to take the address from.
_MIRROR_VARIABLE = "RAMBLOCK_LAB_MIRROR"


class Package(NamedTuple):
    """A package and its version, as apt names them."""

    name: str
    version: str


class Archive:
    """
    Debian's archive as seen from a folder of our own.

    :param folder: For lists and packages; what is there already is used.
    """

    def __init__(self, folder: Path, shell: Shell) -> None:
        self._folder = folder
        self._shell = shell
        self._debs = folder / "archives"

    def update(self) -> None:
        """
        Fetch the lists.

        :raises LabError: apt knows of no Debian archive.
        :raises CommandError: apt-get failed.
        """
        trust = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
        mirror = self._mirror()
        if not self._shell.dry_run:
            for name in ("lists/partial", "archives/partial"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            (self._folder / "status").touch()
            (self._folder / "sources.list").write_text(
                "".join(f"deb{trust} {mirror} {suite} main\n" for suite in (_SUITE, _BACKPORTS))
            )
        self._shell.run(self._apt_get("update"), what="package lists")

    def newest(self, pattern: str) -> Package:
        """
        Return the newest package whose name fits *pattern*.

        It is a regular expression with the version as its group.

        :raises LabError: There is none.
        """
        names = self._shell.ask(["apt-cache", *self._options(), "pkgnames"]).split()
        matches = [match for name in names if (match := re.fullmatch(pattern, name))]
        if not matches:
            raise LabError(f"no package in {_SUITE} or {_BACKPORTS} fits {pattern}")
        best = max(matches, key=lambda match: [int(n) for n in match[1].split(".")])[0]
        policy = self._shell.ask(["apt-cache", *self._options(), "policy", best])
        candidate = re.search(r"Candidate: (\S+)", policy)
        if candidate is None or candidate[1] == "(none)":
            raise LabError(f"apt has no version of {best} to offer")
        return Package(best, candidate[1])

    def download(self, package: Package) -> Path:
        """
        Fetch the package alone; return its file.

        One that is there already and has the right checksum is kept.

        :raises CommandError: apt-get failed.
        """
        name, version = package
        self._shell.run(
            self._apt_get("download", f"{name}={version}"),
            what=f"download of {name}",
            cwd=self._debs,
        )
        # As apt names files: a colon of the version is written %3a.
        for deb in self._debs.glob(f"{name}_*.deb"):
            if unquote(deb.name).split("_")[1] == version:
                return deb
        if self._shell.dry_run:
            return self._debs / f"{name}_{version}_all.deb"
        raise LabError(f"apt-get left no {name} {version} in {self._debs}")

    def download_closure(self, name: str) -> list[Path]:
        """
        Fetch the package and all that it depends on; return the files.

        :raises CommandError: apt-get failed.
        """
        install = self._apt_get(
            "--target-release", _BACKPORTS, "--no-install-recommends", "install"
        )
        self._shell.run([*install, "--yes", "--download-only", name], what=f"download of {name}")
        if self._shell.dry_run:
            return []
        # 'URL' FILE SIZE HASH, one a line. A file that is there already is no longer in the list,
        # hence the folder without its packages.
        uris = self._shell.ask(
            [*install, "-o", "Dir::Cache::archives=empty", "--print-uris", "--yes", name]
        )
        return [self._debs / line.split()[1] for line in uris.splitlines() if line.startswith("'")]

    def _apt_get(self, *arguments: str) -> list[str]:
        return ["apt-get", "-q", *self._options(), *arguments]

    def _options(self) -> list[str]:
        settings = {
            "Dir::Etc::sourcelist": self._folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self._folder,
            "Dir::State::lists": self._folder / "lists",
            "Dir::State::status": self._folder / "status",
            "Dir::Cache": self._folder,
            "Dir::Cache::archives": self._debs,
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            # Else apt adds what every Debian system has to have.
            "pkgCacheGen::ForceEssential": "none",
            # _apt, whom root's apt-get becomes to download, may not enter a home folder; apt would
            # do the same after a warning for each file.
            "APT::Sandbox::User": "root",
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def _mirror(self) -> str:
        if given := os.environ.get(_MIRROR_VARIABLE):
            return given
        found = mirror_from(self._shell.ask(["apt-get", "indextargets", "Created-By: Packages"]))
        if found is None:
            raise LabError(
                f"apt knows of no Debian archive; set {_MIRROR_VARIABLE} to the address of one "
                "(that below which dists/ and pool/ are)"
            )
        return found


def mirror_from(targets: str) -> str | None:
    """
    Find the address of Debian's own archive in what ``apt-get indextargets`` prints.

    None if it is not there.
    """
    addresses = []
    for block in targets.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        address = fields.get("Repo-URI", "").rstrip("/")
        # Origin is known once the lists have been fetched; before that the last part of the address
        # tells. The archive of security updates has the label Debian-Security and its own last
        # part.
        if fields.get("Label", "Debian") == "Debian" and address.endswith("/debian"):
            addresses.append(address)
    return addresses[0] if addresses else None
