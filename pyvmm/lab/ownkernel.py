# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel, built from Debian's linux-source in two variants: the lab's host, and a protected guest's.

``kernels/`` in the lab's cache holds ``KEY/`` (immutable once there, named by what it was made of: the source, the
variant's options of ownkernel.config, the compiler), a link to one of them for each variant (``current`` is the host's,
``current-guest`` the guest's) and ``build.log`` (of the last build). Everything appears by rename. A build holds
``kernel.lock``, and the cache's ``lock`` only while it uses apt: images can be built meanwhile.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import kernels
from pyvmm.lab.apt import Apt, AptError, Package, Progress, silent, updated_apt
from pyvmm.lab.cache import GRACE_SECONDS, Cache, file_sha256
from pyvmm.lab.kbuild import KernelBuild, SourceTree
from pyvmm.syntax.foreign import load_json

PACKAGE = "linux-source"
SOURCE = re.compile(r"linux-source-[0-9]")
SUITES = kernels.SUITES[kernels.DEFAULT]
FRAGMENT = Path(__file__).with_name("ownkernel.config")
CROSS = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
COMPILER = f"gcc-{CROSS.removesuffix('-')}" if CROSS else "gcc"
"""The package."""

DISK = 1150 << 20


class Variant(enum.StrEnum):
    """The purpose of a kernel of the project."""

    HOST = "host"
    """The lab boots it: pKVM with a hypervisor that can be traced."""
    GUEST = "guest"
    """A guest boots it: it has drivers for what pyvmm's guests have, and traces nothing."""

    @property
    def link(self) -> str:
        """The name of the link to the variant's kernel in the cache."""
        return "current" if self is Variant.HOST else f"current-{self}"

    @property
    def steps(self) -> int:
        """About how many files make reports. Progress is relative to this until a build was counted."""
        return 1750 if self is Variant.HOST else 1400


VARIABLES = {
    "ARCH": "arm64",
    "CROSS_COMPILE": CROSS,
    # The same source and tools give the same kernel, whoever builds it, wherever and whenever.
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "pyvmm",
    "KBUILD_BUILD_HOST": "lab",
    "KBUILD_BUILD_VERSION": "1",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The inputs of a kernel. ``source`` is (name, version, sha256), ``built`` a UTC time, ISO 8601.

    ``refused`` are the options of ownkernel.config that this source does not accept as given. ``steps`` is how many
    files make reported, 0 if that was not counted.
    """

    release: str
    built: str
    source: tuple[str, str, str]
    compiler: str
    recipe: str
    refused: list[str]
    size: int
    sha256: str
    steps: int = 0

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse a manifest. Raises ValueError, LookupError or TypeError for anything else."""
        data = load_json(text)
        name, version, digest = data["source"]
        return cls(**{**data, "source": (name, version, digest)})


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A built kernel. Its directory has the Image, its whole ``config``, and the manifest."""

    directory: Path
    manifest: Manifest

    @property
    def path(self) -> Path:
        return self.directory / "Image"

    @property
    def release(self) -> str:
        """What ``uname -r`` will say."""
        return self.manifest.release

    def told(self) -> str:
        """Describe the kernel and its path in a line."""
        return f"{self.release}, of {self.manifest.source[0]} {self.manifest.source[1]}: {self.path}"

    def is_whole(self, *, thorough: bool) -> bool:
        """Return whether the Image is the one that was built; ``thorough`` reads it."""
        try:
            right = self.path.stat().st_size == self.manifest.size
            return right and (not thorough or file_sha256(self.path) == self.manifest.sha256)
        except OSError:
            return False


def build_kernels(
    *,
    refresh: bool = False,
    wanted: Iterable[Variant] = tuple(Variant),
    progress: Progress = silent,
    cache: Cache | None = None,
) -> dict[Variant, OwnKernel]:
    """Return the ``wanted`` kernels. Build those that are missing for these options and this compiler.

    ``refresh`` asks the archive for its newest source. Without a network, kernels that
    were built before are used and ``progress`` says so. Raises HostError without a compiler, KernelBuildError if
    the build fails, PyvmmError if it cannot start.
    """
    cache = cache or Cache()
    wanted = tuple(wanted)
    there = {} if refresh else _usable(cache, wanted)
    if len(there) == len(wanted):
        return there
    with cache.lock(lambda: progress("waiting for another build of the kernel", 0.0), "kernel.lock"):
        there = {} if refresh else _usable(cache, wanted)  # the process that held the lock may have built some
        missing = [each for each in wanted if each not in there]
        try:
            return there | _build(cache, missing, refresh, progress) if missing else there
        except AptError as error:
            old = {each: kernel for each in wanted if (kernel := current_kernel(cache, each))}
            if not error.offline or len(old) < len(wanted) or not all(k.is_whole(thorough=True) for k in old.values()):
                raise
            progress(f"offline: using the kernel of {min(kernel.manifest.built for kernel in old.values())}", 1.0)
            return old
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _no_space(cache, "the disk is full") from error


def usable_kernel(
    cache: Cache | None = None, variant: Variant = Variant.HOST, *, thorough: bool = False
) -> OwnKernel | None:
    """Return the variant's kernel if it has this version's options, is from this compiler, and looks complete."""
    kernel = current_kernel(cache or Cache(), variant)
    if kernel is None or not kernel.is_whole(thorough=thorough):
        return None
    try:
        compiler = compiler_version()
    except HostError:  # it is not needed any more
        compiler = kernel.manifest.compiler
    return kernel if kernel.manifest.recipe == recipe_hash(compiler, variant) else None


def current_kernel(cache: Cache, variant: Variant = Variant.HOST) -> OwnKernel | None:
    """Return the kernel that was built last, unchecked, or None if there is no readable one."""
    return _read(_home(cache) / variant.link)


def _usable(cache: Cache, variants: Iterable[Variant]) -> dict[Variant, OwnKernel]:
    return {each: kernel for each in variants if (kernel := usable_kernel(cache, each))}


def compiler_version() -> str:
    """Return the compiler's version line. Raises HostError without a compiler."""
    program = f"{CROSS}gcc"
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"{program} does not run: {error}", hint=f"apt install {COMPILER}") from error
    return answer.stdout.partition("\n")[0]


def options(variant: Variant) -> list[str]:
    """Return the variant's lines of ownkernel.config without their reasons."""
    others = tuple(f"{each}:" for each in Variant if each is not variant)
    parted = (line.partition("#") for line in FRAGMENT.read_text().splitlines())
    return [line.strip() for line, _, reason in parted if line.strip() and not reason.strip().startswith(others)]


def recipe_hash(compiler: str, variant: Variant) -> str:
    """Hash everything that shapes a kernel except its source. Reasons of options do not count."""
    return hashlib.sha256(json.dumps([options(variant), VARIABLES, compiler]).encode()).hexdigest()


def _home(cache: Cache) -> Path:
    return cache.directory / "kernels"


def _read(directory: Path) -> OwnKernel | None:
    try:
        directory = directory.resolve(strict=True)
        return OwnKernel(directory, Manifest.from_json((directory / "manifest.json").read_text()))
    except (OSError, ValueError, LookupError, TypeError):  # missing, or not a manifest
        return None


def _build(cache: Cache, variants: Iterable[Variant], refresh: bool, progress: Progress) -> dict[Variant, OwnKernel]:
    compiler = compiler_version()
    home = _home(cache)
    home.mkdir(exist_ok=True)
    package = None
    with cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(cache.apt, SUITES, refresh=refresh, progress=progress)
        progress("resolving packages", 0.0)
        source = find_source(apt)
        recipes = {each: recipe_hash(compiler, each) for each in variants}
        places = {each: home / _key(source, recipe) for each, recipe in recipes.items()}
        built = {each: made for each in places if (made := _read(places[each])) and made.is_whole(thorough=True)}
        missing = {each: place for each, place in places.items() if each not in built}
        if missing:
            if (free := shutil.disk_usage(home).free) < DISK:
                raise _no_space(cache, f"{free / 1e6:.0f} MB are free")
            package = download_source(apt, source, home / "source", progress)
    for each, kernel in built.items():
        _adopt(home, each, kernel)
    if package is None:
        _drop_old(home)
        return built
    steps = _Steps(cache, missing, progress)
    with cache.scratch("kernel-partial") as scratch:
        making = _Making(scratch, home / "build.log", source, compiler)
        making.unpack(package, progress)
        builds = {each: making.configured(each, progress) for each in missing}
        for each, (build, refused) in builds.items():
            build.compile(partial(steps.step, each))
            made = making.finish(each, build, recipe=recipes[each], refused=refused, steps=steps.taken[each])
            shutil.rmtree(missing[each], ignore_errors=True)  # damaged, if it is there
            made.directory.rename(missing[each])
            built[each] = _adopt(home, each, OwnKernel(missing[each], made.manifest))
    shutil.rmtree(package.parent)  # kept until here: a build that failed need not fetch it again
    _drop_old(home)
    return built


def _key(source: Package, recipe: str) -> str:
    return hashlib.sha256(json.dumps([source.sha256, recipe]).encode()).hexdigest()[:16]


def find_source(apt: Apt) -> Package:
    """Return the package with the newest source of Linux."""
    found = [pair for pair in apt.resolve(PACKAGE, suite=SUITES[-1]) if SOURCE.match(pair[0])]
    if not found:
        raise PyvmmError(f"{SUITES[-1]} has no {PACKAGE}", hint="the archive has changed: please report this")
    return apt.locate(found[:1])[0]


def download_source(apt: Apt, source: Package, directory: Path, progress: Progress) -> Path:
    """Fetch the source into ``directory``, which builds of images do not clean."""
    directory.mkdir(exist_ok=True)
    for other in directory.iterdir():
        if other.name != source.file:
            other.unlink()
    apt.archives = directory
    apt.download([source], progress)
    return directory / source.file


class _Steps:
    """Counts the files that make reports, and their share of those in the kernels' last builds."""

    def __init__(self, cache: Cache, variants: Iterable[Variant], progress: Progress) -> None:
        last = {each: current_kernel(cache, each) for each in variants}
        self._expected = {each: (kernel and kernel.manifest.steps) or each.steps for each, kernel in last.items()}
        self._progress = progress
        self.taken = dict.fromkeys(self._expected, 0)

    def step(self, variant: Variant) -> None:
        """Count one file of the variant."""
        self.taken[variant] += 1
        total = sum(self._expected.values())
        taken = sum(min(self.taken[each], most) for each, most in self._expected.items())
        self._progress(f"compiling, about {round(total, -1):,} files", min(taken / total, 0.99))


class _Making:
    """Makes kernels of one source in ``scratch``, each in a directory with the variant's name."""

    def __init__(self, scratch: Path, log: Path, source: Package, compiler: str) -> None:
        log.write_text(f"{source.name} {source.version}, {compiler}\n")
        self._scratch, self._source, self._compiler = scratch, source, compiler
        self._tree = SourceTree(scratch / "tree", log, VARIABLES)

    def unpack(self, package: Path, progress: Progress) -> None:
        self._tree.unpack(package, progress)
        progress("configuring", 0.0)

    def configured(self, variant: Variant, progress: Progress) -> tuple[KernelBuild, list[str]]:
        """Return a kernel that can be compiled, and its options that the source does not accept."""
        build = KernelBuild(self._tree, self._scratch / variant)
        if refused := build.configure(options(variant)):
            progress(f"not as asked in this source: {' '.join(refused)}", 1.0)
        return build, refused

    def finish(self, variant: Variant, build: KernelBuild, *, recipe: str, refused: list[str], steps: int) -> OwnKernel:
        """Return the compiled kernel, in a directory that has nothing else."""
        done = self._scratch / f"{variant}-done"
        done.mkdir()
        build.image.replace(done / "Image")
        build.config.replace(done / "config")
        manifest = Manifest(
            release=build.release,
            built=datetime.now(UTC).isoformat(timespec="seconds"),
            source=(self._source.name, self._source.version, self._source.sha256),
            compiler=self._compiler,
            recipe=recipe,
            refused=refused,
            size=(done / "Image").stat().st_size,
            sha256=file_sha256(done / "Image"),
            steps=steps,
        )
        (done / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))
        return OwnKernel(done, manifest)


def _adopt(home: Path, variant: Variant, kernel: OwnKernel) -> OwnKernel:
    """Make the kernel the variant's current one."""
    link = home / f"{variant.link}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.directory.name)
    link.replace(home / variant.link)
    return kernel


def _drop_old(home: Path) -> None:
    """Remove kernels that no variant uses and that no lab can be starting from."""
    used = {(home / each.link).resolve() for each in Variant}
    for other in home.iterdir():
        is_link = other.is_symlink() or not other.is_dir()
        if not is_link and other.resolve() not in used and time.time() - other.stat().st_mtime > GRACE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


def _no_space(cache: Cache, why: str) -> PyvmmError:
    return PyvmmError(
        f"no space in {cache.directory} to build the kernel: {why}",
        hint=f"free {DISK / 1e6:.0f} MB there, or set XDG_CACHE_HOME to a larger place",
    )
