"""Debian's arm64 qemu-system-aarch64 as a tree: the program, the libraries it needs, and the loader that finds them.

The lab's root has another set of packages and no room for QEMU's: nothing of this tree is where programs look for it.
"""

from __future__ import annotations

import re
import shutil
from io import BytesIO
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress, updated_apt
from pyvmm.lab.kernels import DEFAULT, SUITES
from pyvmm.lab.needs import require_for_packages
from pyvmm.lab.rootfs import open_package
from pyvmm.lab.trees import Recipe, Scratch, digest_of

NAME = "qemu"
PACKAGE = "qemu-system-arm"
PROGRAM = "qemu-system-aarch64"
LOADER = "ld-linux-aarch64.so.1"
WANTED = re.compile(rf"usr/(?:bin/{PROGRAM}|lib/aarch64-linux-gnu/[^/]+\.so[^/]*)")


def recipe() -> Recipe:
    """Tell how the tree is made."""
    return Recipe(NAME, digest_of(PACKAGE, WANTED.pattern), _make)


def command(tree: Path) -> list[str]:
    """Give the beginning of a command that runs the tree's QEMU, wherever the tree is."""
    return [str(tree / LOADER), "--library-path", str(tree), str(tree / PROGRAM)]


def _make(scratch: Scratch, progress: Progress) -> str:
    require_for_packages("a QEMU for the lab")
    with scratch.cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(scratch.cache.apt, SUITES[DEFAULT], refresh=False, progress=progress)
        progress("resolving packages", 0.0)
        packages = apt.locate(apt.resolve(PACKAGE))
        apt.archives = scratch.downloads
        (scratch.downloads / "partial").mkdir(exist_ok=True)
        apt.download(packages, progress)
    for number, package in enumerate(packages):
        progress("unpacking QEMU", number / len(packages))
        _unpack(scratch.downloads / package.file, scratch.work)
    progress("choosing libraries", 0.0)
    for path in _needed(scratch.work):
        shutil.copy(path, scratch.tree)
    return next(f"{package.name} {package.version}" for package in packages if package.name == PACKAGE)


def _unpack(package: Path, directory: Path) -> None:
    """Take programs and libraries out of a package, all into one directory."""
    with open_package(package) as tar:
        for member in tar:
            path = directory / Path(member.name).name
            if not WANTED.fullmatch(member.name.removeprefix("./")):
                continue
            if member.issym():
                path.unlink(missing_ok=True)
                path.symlink_to(Path(member.linkname).name)
            elif file := tar.extractfile(member):
                path.write_bytes(file.read())
                path.chmod(member.mode & 0o777)


def _needed(directory: Path) -> list[Path]:
    """Give the program and all libraries that it needs, as they are called; PyvmmError where one is not there."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    found: dict[str, Path] = {}
    wanted = [PROGRAM, LOADER]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = path = directory / name
        if not path.is_file():
            raise PyvmmError(f"{PACKAGE}'s packages lack {name}", hint="the archive has changed: please report this")
        section = ELFFile(BytesIO(path.read_bytes())).get_section_by_name(".dynamic")
        if isinstance(section, DynamicSection):
            wanted += [tag.needed for tag in section.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
    return list(found.values())
