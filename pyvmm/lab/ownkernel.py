# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel, built from Debian's linux-source: it opens its hypervisor, and a protected VM can run it.

``kernels/`` in the lab's cache holds ``KEY/`` (immutable once there, named by what it was made of: the source, the
options of ownkernel.config, the compiler), ``current`` (a link to one of them) and ``build.log`` (of the last build).
Everything appears by rename. A build holds ``kernel.lock``, and the cache's ``lock`` only while it uses apt: images
can be built meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import kernels
from pyvmm.lab.apt import Apt, AptError, Package, Progress, silent, updated_apt
from pyvmm.lab.cache import GRACE_SECONDS, Cache, file_sha256
from pyvmm.lab.kbuild import SourceTree

PACKAGE = "linux-source"
SOURCE = re.compile(r"linux-source-[0-9]")
SUITES = kernels.SUITES[kernels.DEFAULT]
FRAGMENT = Path(__file__).with_name("ownkernel.config")
CROSS = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
COMPILER = f"gcc-{CROSS.removesuffix('-')}" if CROSS else "gcc"
"""The package."""

DISK = 1000 << 20

VARIABLES = {
    "ARCH": "arm64",
    "CROSS_COMPILE": CROSS,
    # The same kernel from the same source by the same tools, whoever builds it, where and when.
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "pyvmm",
    "KBUILD_BUILD_HOST": "lab",
    "KBUILD_BUILD_VERSION": "1",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a kernel was made of. ``source`` is (name, version, sha256), ``built`` a UTC time, ISO 8601.

    ``refused`` are the options that this source does not take as they are in ownkernel.config.
    """

    release: str
    built: str
    source: tuple[str, str, str]
    compiler: str
    recipe: str
    refused: list[str]
    size: int
    sha256: str

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse; ValueError, LookupError or TypeError where it is not a manifest."""
        data = json.loads(text)
        name, version, digest = data["source"]
        return cls(**{**data, "source": (name, version, digest)})


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A kernel that was built. Its directory has the Image, its whole ``config``, and the manifest."""

    directory: Path
    manifest: Manifest

    @property
    def path(self) -> Path:
        return self.directory / "Image"

    @property
    def release(self) -> str:
        """What ``uname -r`` will say."""
        return self.manifest.release

    def is_whole(self, *, thorough: bool) -> bool:
        """Whether the Image is what was built; ``thorough`` reads it to be sure."""
        try:
            right = self.path.stat().st_size == self.manifest.size
            return right and (not thorough or file_sha256(self.path) == self.manifest.sha256)
        except OSError:
            return False


def build_kernel(*, refresh: bool = False, progress: Progress = silent, cache: Cache | None = None) -> OwnKernel:
    """Give the project's kernel, building it where there is none of these options and by this compiler.

    ``refresh`` asks the archive for its newest source. Where that needs the network and there is none, a kernel that
    was built before is used and ``progress`` says so. HostError where there is no compiler, KernelBuildError where the
    build fails, PyvmmError where it cannot begin.
    """
    cache = cache or Cache()
    if not refresh and (kernel := usable_kernel(cache)):
        return kernel
    with cache.lock(lambda: progress("waiting for another build of the kernel", 0.0), "kernel.lock"):
        if not refresh and (kernel := usable_kernel(cache)):  # built by whom we waited for
            return kernel
        try:
            return _build(cache, refresh, progress)
        except AptError as error:
            old = current_kernel(cache)
            if not error.offline or old is None or not old.is_whole(thorough=True):
                raise
            progress(f"offline: using the kernel of {old.manifest.built}", 1.0)
            return old
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _no_space(cache, "the disk is full") from error


def usable_kernel(cache: Cache | None = None, *, thorough: bool = False) -> OwnKernel | None:
    """Give the current kernel if it has this version's options, is this compiler's work, and looks whole."""
    kernel = current_kernel(cache or Cache())
    if kernel is None or not kernel.is_whole(thorough=thorough):
        return None
    try:
        compiler = compiler_version()
    except HostError:  # it is not needed any more
        compiler = kernel.manifest.compiler
    return kernel if kernel.manifest.recipe == recipe_hash(compiler) else None


def current_kernel(cache: Cache) -> OwnKernel | None:
    """Give the kernel that was built last, None where there is none that can be understood. It is not checked."""
    return _read(_home(cache) / "current")


def compiler_version() -> str:
    """Give what the compiler says it is. HostError where there is none."""
    program = f"{CROSS}gcc"
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"{program} does not run: {error}", hint=f"apt install {COMPILER}") from error
    return answer.stdout.partition("\n")[0]


def options() -> list[str]:
    """Give the lines of ownkernel.config without their reasons."""
    lines = (line.partition("#")[0].strip() for line in FRAGMENT.read_text().splitlines())
    return [line for line in lines if line]


def recipe_hash(compiler: str) -> str:
    """Give a hash of all that shapes a kernel besides its source; a reason that is reworded does not."""
    return hashlib.sha256(json.dumps([options(), VARIABLES, compiler]).encode()).hexdigest()


def _home(cache: Cache) -> Path:
    return cache.directory / "kernels"


def _read(directory: Path) -> OwnKernel | None:
    try:
        directory = directory.resolve(strict=True)
        return OwnKernel(directory, Manifest.from_json((directory / "manifest.json").read_text()))
    except (OSError, ValueError, LookupError, TypeError):  # missing, or no manifest of ours
        return None


def _build(cache: Cache, refresh: bool, progress: Progress) -> OwnKernel:
    recipe = recipe_hash(compiler := compiler_version())
    home = _home(cache)
    home.mkdir(exist_ok=True)
    with cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(cache.apt, SUITES, refresh=refresh, progress=progress)
        progress("resolving packages", 0.0)
        source = find_source(apt)
        directory = home / hashlib.sha256(json.dumps([source.sha256, recipe]).encode()).hexdigest()[:16]
        if (made := _read(directory)) and made.is_whole(thorough=True):
            return _adopt(home, made)
        if (free := shutil.disk_usage(home).free) < DISK:
            raise _no_space(cache, f"{free / 1e6:.0f} MB are free")
        package = download_source(apt, source, home / "source", progress)
    with cache.scratch("kernel-partial") as scratch:
        made = _make(source, package, scratch, home / "build.log", progress, compiler, recipe)
        shutil.rmtree(directory, ignore_errors=True)  # damaged, if it is there
        made.directory.rename(directory)
    shutil.rmtree(package.parent)  # kept until here: who corrects what made a build fail need not fetch it again
    return _adopt(home, OwnKernel(directory, made.manifest))


def find_source(apt: Apt) -> Package:
    """Give the package with the newest source of Linux."""
    found = [pair for pair in apt.resolve(PACKAGE, suite=SUITES[-1]) if SOURCE.match(pair[0])]
    if not found:
        raise PyvmmError(f"{SUITES[-1]} has no {PACKAGE}", hint="the archive has changed: please report this")
    return apt.locate(found[:1])[0]


def download_source(apt: Apt, source: Package, directory: Path, progress: Progress) -> Path:
    """Fetch the source into ``directory``, where builds of images do not clear up."""
    directory.mkdir(exist_ok=True)
    for other in directory.iterdir():
        if other.name != source.file:
            other.unlink()
    apt.archives = directory
    apt.download([source], progress)
    return directory / source.file


def _make(
    source: Package, package: Path, scratch: Path, log: Path, progress: Progress, compiler: str, recipe: str
) -> OwnKernel:
    """Unpack, configure and compile in ``scratch``; give the kernel, in a directory in there that has nothing else."""
    log.write_text(f"{source.name} {source.version}, {compiler}\n")
    tree = SourceTree(scratch / "tree", log, VARIABLES)
    tree.unpack(package, progress)
    progress("configuring", 0.0)
    if refused := tree.configure(options()):
        progress(f"not as asked in this source: {' '.join(refused)}", 1.0)
    tree.compile(progress)
    done = scratch / "done"
    done.mkdir()
    tree.image.replace(done / "Image")
    tree.config.replace(done / "config")
    manifest = Manifest(
        release=tree.release,
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        source=(source.name, source.version, source.sha256),
        compiler=compiler,
        recipe=recipe,
        refused=refused,
        size=(done / "Image").stat().st_size,
        sha256=file_sha256(done / "Image"),
    )
    (done / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))
    return OwnKernel(done, manifest)


def _adopt(home: Path, kernel: OwnKernel) -> OwnKernel:
    """Make the kernel the current one, drop older ones that no lab can be starting from."""
    link = home / "current.new"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.directory.name)
    link.replace(home / "current")
    for other in home.iterdir():
        is_link = other.is_symlink() or not other.is_dir()
        if not is_link and other != kernel.directory and time.time() - other.stat().st_mtime > GRACE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return kernel


def _no_space(cache: Cache, why: str) -> PyvmmError:
    return PyvmmError(
        f"no space in {cache.directory} to build the kernel: {why}",
        hint=f"free {DISK / 1e6:.0f} MB there, or set XDG_CACHE_HOME to a larger place",
    )
