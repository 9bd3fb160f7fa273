# SPDX-License-Identifier: Apache-2.0
"""A tree of Linux's source from Debian's package, and kernels of it, each configured and compiled separately.

Owns the directories' contents, the make processes, and the log's new lines. Errors have
explanations. Use it from one thread at a time.
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import signal
import subprocess
import tarfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress
from pyvmm.lab.rootfs import open_package

ARCHIVE = re.compile(r"(?:\./)?usr/src/linux-source-[^/]+\.tar\.xz")

# Most of Linux is for architectures and drivers that this kernel lacks. Their Kconfig files stay: kconfig reads all.
UNUSED = re.compile(
    r"(?:Documentation|LICENSES|rust|sound|arch/(?!arm64/)[^/]+|"
    r"drivers/(?:accel|crypto|gpu|iio|infiniband|media|scsi|staging|usb|(?:clk|net|pinctrl)/[^/]+)|"
    r"tools/(?:perf|testing))/"
)
DESCRIPTION = re.compile(r"(?:.*/)?(?:(?:Kconfig|Makefile|Kbuild)[^/]*|[^/]*\.tbl)")

STEP = re.compile(r"  [A-Z]+ +\S")
COMPLAINT = re.compile(
    r"\berror\b|\*\*\*|not found|no such file|no space left|killed|undefined reference", re.IGNORECASE
)
PASSED_ON = ("HOME", "PATH", "TMPDIR")
"""Of the environment: what else there is may be meant for another kernel's make."""


class KernelBuildError(PyvmmError):
    """make failed; ``log`` has all its output."""

    def __init__(self, message: str, log: Path, *, hint: str | None = None) -> None:
        super().__init__(f"{message}\n  everything it said is in {log}", hint=hint)
        self.log = log


class SourceTree:
    """Linux's source in ``directory``. Each make gets ``variables``, and writes to ``log``."""

    made = "the kernel"
    """What a build that fails says it was to be."""

    def __init__(self, directory: Path, log: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self.log = log
        self._variables = variables

    def unpack(self, package: Path, progress: Progress) -> None:
        """Unpack the wanted files of the package."""
        what = "unpacking the source"
        progress(what, 0.0)
        with open_package(package) as outer:
            for member in outer:
                if ARCHIVE.fullmatch(member.name) and (packed := outer.extractfile(member)):
                    break
            else:
                raise PyvmmError(f"{package.name} has no source of Linux in it", hint="please report this")
            try:
                with lzma.open(packed) as plain, tarfile.open(fileobj=plain, mode="r|", bufsize=1 << 20) as tar:
                    for number, file in enumerate(tar):
                        self._place(tar, file)
                        if number % 1000 == 999:
                            progress(what, packed.tell() / member.size)
            except (lzma.LZMAError, EOFError) as error:
                raise PyvmmError(f"{package.name} is not a readable package: {error}") from error

    def _is_wanted(self, name: str) -> bool:
        """Return whether an arm64 kernel with few drivers needs a file."""
        return not UNUSED.match(name) or DESCRIPTION.fullmatch(name) is not None

    def _place(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = member.name.partition("/")[2]
        if not self._is_wanted(name):
            return
        path = self.directory / name
        if ".." in path.parts:
            raise PyvmmError(f"the source of Linux wants to be outside of its directory: {member.name}")
        if member.isdir() or not name:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.issym():
            path.symlink_to(member.linkname)
        elif file := tar.extractfile(member):
            path.write_bytes(file.read())
            path.chmod(0o755 if member.mode & 0o100 else 0o644)

    def make(self, target: str, variables: Mapping[str, str], step: Callable[[], None] | None = None) -> None:
        """Run make; ``step`` is called for each file that make reports. Raises KernelBuildError if make fails."""
        settings = [f"{name}={value}" for name, value in {**self._variables, **variables}.items()]
        command = ["make", f"-j{len(os.sched_getaffinity(0))}", *settings, target]
        complaints: list[str] = []
        last: deque[str] = deque(maxlen=5)
        with (
            self.log.open("a", buffering=1) as log,
            subprocess.Popen(
                command,
                cwd=self.directory,
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a ^C at the terminal is for us; all of make's processes end with this one
            ) as process,
        ):
            log.write(f"$ {shlex.join(command)}\n")
            try:
                for line in map(str.rstrip, process.stdout or ()):
                    log.write(f"{line}\n")
                    last.append(line)
                    if STEP.match(line):
                        if step is not None:
                            step()
                    elif COMPLAINT.search(line):
                        complaints.append(line)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0:
            raise self._failure(f"make {target} ended with status {process.returncode}", complaints, last)

    def _failure(self, what: str, complaints: list[str], last: Sequence[str]) -> KernelBuildError:
        told = "".join(f"\n  | {line}" for line in dict.fromkeys((*complaints[:8], *last)))
        all_told = "".join(complaints)
        hint = None
        if "No space left" in all_told:
            hint = "free some space in the lab's cache, or set XDG_CACHE_HOME to a larger place"
        elif "Killed" in all_told:
            hint = "the machine ran out of memory: a compiler takes up to 500 MB for each CPU"
        return KernelBuildError(f"{self.made} could not be built: {what}; it said:{told}", self.log, hint=hint)


class KernelBuild:
    """A kernel of ``source``, configured and compiled in the new ``directory``. The source does not change."""

    def __init__(self, source: SourceTree, directory: Path) -> None:
        directory.mkdir()
        self._source = source
        self._directory = directory

    @property
    def image(self) -> Path:
        """The kernel, once compiled."""
        return self._directory / "arch/arm64/boot/Image"

    @property
    def config(self) -> Path:
        """The whole configuration, once configured."""
        return self._directory / ".config"

    @property
    def release(self) -> str:
        """What ``uname -r`` will say, once compiled."""
        return (self._directory / "include/config/kernel.release").read_text().strip()

    def configure(self, options: Sequence[str]) -> list[str]:
        """Set ``options`` and answer no to everything else. Return the options that this source does not accept."""
        wanted = self._directory / "wanted.config"
        wanted.write_text("".join(f"{line}\n" for line in options))
        self._make("allnoconfig", {"KCONFIG_ALLCONFIG": str(wanted)})
        taken = set(self.config.read_text().splitlines())
        taken |= {f"{line.split()[1]}=n" for line in taken if line.endswith(" is not set")}
        known = {line.partition("=")[0] for line in taken}
        return [
            line
            for line in options
            if line not in taken and not (line.endswith("=n") and line.removesuffix("=n") not in known)
        ]

    def compile(self, step: Callable[[], None]) -> None:
        """Compile it; ``step`` is called for each file made. Raises KernelBuildError if that fails."""
        self._make("Image", {}, step)

    def _make(self, target: str, variables: Mapping[str, str], step: Callable[[], None] | None = None) -> None:
        self._source.make(target, {"O": str(self._directory), **variables}, step)
