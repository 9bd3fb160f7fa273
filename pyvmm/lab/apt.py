# SPDX-License-Identifier: Apache-2.0
"""Fetch Debian's packages for the lab, by apt with a private state. This machine's apt configuration is not used.

Owns one directory. Runs as any user. apt checks signatures and hashes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab.cache import file_sha256
from pyvmm.lab.kernels import BACKPORTS, SUITE

CANONICAL_MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHITECTURE = "arm64"
LISTS_FRESH_SECONDS = 3600

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is, 0 to 1."""


def silent(_what: str, _share: float) -> None:
    """Report no progress."""


class AptError(PyvmmError):
    """apt failed; ``offline`` if the network seems to be the reason."""

    def __init__(self, message: str, *, offline: bool, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.offline = offline


@dataclass(frozen=True, slots=True)
class Package:
    """A package file of a mirror. ``size`` is in bytes."""

    name: str
    version: str
    file: str
    size: int
    sha256: str


def package_file(name: str, version: str) -> str:
    """Return the name of a package's file up to the architecture."""
    return f"{name}_{version.replace(':', '%3a')}"


def machine_mirror() -> str:
    """Return the Debian mirror that this machine's apt uses (it may be a local one), else the canonical one."""
    form = "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)"
    try:
        answer = subprocess.run(
            ["apt-get", "indextargets", "--format", form], capture_output=True, text=True, check=False
        )
    except OSError:
        return CANONICAL_MIRROR
    for line in answer.stdout.splitlines():
        origin, component, uri = line.split("|", 2)
        if origin == "Debian" and component == "main" and "security" not in uri:
            return uri.rstrip("/")
    return CANONICAL_MIRROR


class Apt:
    """apt for arm64 Debian with its state below ``directory``; it knows only the packages of ``suites``."""

    def __init__(self, directory: Path, mirror: str, suites: Sequence[str] = (SUITE, BACKPORTS)) -> None:
        self.directory = directory
        self.archives = directory / "archives"
        self.mirror = mirror
        self.suites = suites
        self._config = directory / "apt.conf"

    def prepare(self) -> None:
        """Write the configuration. Raises HostError if Debian's keys are missing."""
        if not KEYRING.exists():
            raise HostError(
                f"Debian's archive keys are not installed ({KEYRING})", hint="apt install debian-archive-keyring"
            )
        for name in ("lists/partial", "archives/partial"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        (self.directory / "sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {self.mirror} {suite} main\n" for suite in self.suites)
        )
        settings = {
            "APT::Architecture": ARCHITECTURE,
            "APT::Get::List-Cleanup": "false",  # a request for another suite must not fetch this one again
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # the directory is the user's: apt's sandbox user may not write there
            "Acquire::ForceHash": "SHA256",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            "Dir::Etc::sourcelist": str(self.directory / "sources.list"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": str(self.directory),
            "Dir::State::lists": str(self.directory / "lists"),
            "Dir::State::status": str(self.directory / "status"),
            "Dir::Cache": str(self.directory),
            "Dir::Cache::archives": str(self.archives),
            "Dir::Cache::pkgcache": "pkgcache.bin",  # resolving three times reads the lists once
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
        }
        # These are lists: clear them, so that this machine's hooks and indexes are not run or fetched.
        cleared = ("APT::Architectures", "APT::Update", "DPkg::Post-Invoke", "Acquire::IndexTargets")
        text = "".join(f"#clear {name};\n" for name in cleared)
        text += "".join(f'{name} "{value}";\n' for name, value in settings.items())
        text += f'APT::Architectures {{ "{ARCHITECTURE}"; }};\n' + _PACKAGES_INDEX
        self._config.write_text(text)

    def update(self, progress: Progress) -> None:
        """Fetch the package lists."""
        self._watch(["apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any"], "package lists", progress)
        for suite in self.suites:
            self._stamp(suite).write_text(self.mirror)

    def newest_age(self) -> float | None:
        """Return the seconds since the lists of all suites were fetched from this mirror, else None."""
        # The times of the lists themselves say when the mirror changed.
        stamps = [self._stamp(suite) for suite in self.suites]
        if not all(stamp.exists() and stamp.read_text() == self.mirror for stamp in stamps):
            return None
        return time.time() - min(stamp.stat().st_mtime for stamp in stamps)

    def _stamp(self, suite: str) -> Path:
        return self.directory / f"fetched-{suite}"

    def resolve(self, *names: str, suite: str = SUITE) -> list[tuple[str, str]]:
        """Return (name, version) of all packages that an installation of ``names`` in an empty system needs."""
        answer = self._run(["apt-get", "-s", "install", "-t", suite, *names])
        return re.findall(r"^Inst (\S+) \((\S+) ", answer, re.MULTILINE)

    def locate(self, packages: list[tuple[str, str]]) -> list[Package]:
        """Return the locations of exactly these versions on the mirror, in the same order."""
        wanted = [f"{name}={version}" for name, version in packages]
        answer = self._run(["apt-get", "download", "--print-uris", *wanted])
        found: dict[str, tuple[str, int, str]] = {}
        for line in answer.splitlines():
            _uri, file, size, digest = shlex.split(line)
            found[file.split("_", 1)[0]] = (file, int(size), digest.removeprefix("SHA256:"))
        return [Package(name, version, *found[name]) for name, version in packages]

    def download(self, packages: list[Package], progress: Progress) -> None:
        """Fetch the package files that are missing or incomplete in ``archives``."""
        for package in packages:
            path = self.archives / package.file
            # apt checks what it fetches. Of existing files it compares only the size.
            if path.exists() and file_sha256(path) != package.sha256:
                path.unlink()
        megabytes = sum(package.size for package in packages) / 1e6
        wanted = [f"{package.name}={package.version}" for package in packages]
        self._watch(["apt-get", "-q", "download", *wanted], f"packages, {megabytes:.0f} MB", progress)

    def _run(self, command: list[str]) -> str:
        answer = subprocess.run(
            [command[0], "-c", str(self._config), *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,  # not where packages are: those are left out of --print-uris
            env=_environment(),
        )
        if answer.returncode != 0:
            raise _apt_error(command, answer.stderr)
        return answer.stdout

    def _watch(self, command: list[str], what: str, progress: Progress) -> None:
        """Run apt with machine-readable progress in its output, and report that progress."""
        progress(what, 0.0)
        said: list[str] = []
        with subprocess.Popen(
            [command[0], "-c", str(self._config), "-o", "APT::Status-Fd=1", *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.archives,
            env=_environment(),
        ) as process:
            for line in process.stdout or ():
                if line.startswith("dlstatus:"):
                    progress(what, min(float(line.split(":")[2]) / 100, 1.0))
                else:
                    said.append(line)
        if process.returncode != 0:
            raise _apt_error(command, "".join(said))
        progress(what, 1.0)


def updated_apt(directory: Path, suites: Sequence[str], *, refresh: bool, progress: Progress) -> Apt:
    """Return an apt with recent lists of these suites, from this machine's mirror or else the canonical one."""
    mirrors = list(dict.fromkeys((machine_mirror(), CANONICAL_MIRROR)))
    for mirror in mirrors:
        apt = Apt(directory, mirror, suites)
        apt.prepare()
        age = apt.newest_age()
        if age is not None and age < LISTS_FRESH_SECONDS and not refresh:
            return apt
        try:
            apt.update(progress)
            return apt
        except AptError:
            if mirror == mirrors[-1]:
                raise
    raise RuntimeError("no mirror")  # not reached: mirrors is never empty


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _apt_error(command: list[str], said: str) -> AptError:
    """Summarise apt's error output in one or two lines."""
    complaints = [line for line in said.splitlines() if line.startswith(("E:", "W:"))] or said.splitlines()[-3:]
    offline = any(sign in said for sign in _OFFLINE_SIGNS)
    hint = None
    if "No space left on device" in said:
        hint = "free some space: the lab needs about 600 MB while it is built"
    elif offline:
        hint = "building the lab needs Debian's mirror once; afterwards it works offline"
    summary = "\n  ".join(dict.fromkeys(complaints[:4]))
    return AptError(f"{' '.join(command[:3])} failed:\n  {summary}", offline=offline, hint=hint)


_OFFLINE_SIGNS = (
    "Could not resolve",
    "Temporary failure resolving",
    "Could not connect",
    "Unable to connect",
    "Network is unreachable",
    "Connection timed out",
    "Connection failed",
    "Failed to fetch",
)

_PACKAGES_INDEX = """\
Acquire::IndexTargets::deb::Packages {
    MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
    ShortDescription "Packages";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
    Optional "no";
};
"""
