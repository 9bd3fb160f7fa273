# SPDX-License-Identifier: Apache-2.0
"""Debian's arm64 programs as trees: a program, the libraries it needs, and the loader that finds them.

The lab's root has other packages and no room for these. A tree's files are not in their usual places, so run a
launcher, or :func:`command`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Final

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress, updated_apt
from pyvmm.lab.kernels import DEFAULT, SUITES
from pyvmm.lab.needs import require_for_packages
from pyvmm.lab.rootfs import open_package
from pyvmm.lab.trees import Recipe, Scratch, digest_of

LOADER: Final = "ld-linux-aarch64.so.1"
BIN: Final = "bin"
"""Where in a tree its launchers are: a directory for PATH."""
LAUNCHER: Final = """\
#!/bin/sh
tree=${{0%/*}}/..
exec "$tree/{loader}" --library-path "$tree" "$tree/{program}"{options} "$@"
"""


@dataclass(frozen=True, slots=True)
class Programs:
    """The parts to take from a package and its dependencies: programs by name, and files below ``data``.

    ``options`` begin each program's arguments; ``{tree}`` in them is where the tree is.
    """

    name: str
    package: str
    programs: tuple[str, ...]
    data: str = ""
    options: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        """Return the pattern of the paths of wanted programs and libraries."""
        return rf"usr/(?:s?bin/(?:{'|'.join(self.programs)})|lib/aarch64-linux-gnu/[^/]+\.so[^/]*)"

    def recipe(self) -> Recipe:
        """Return the recipe of the tree."""
        digest = digest_of(self.package, self.wanted, self.data, self.options, LAUNCHER)
        return Recipe(self.name, digest, partial(_make, self))

    def command(self, tree: Path, program: str | None = None) -> list[str]:
        """Return the start of a command for one of the tree's programs, by default the first, wherever the tree is."""
        options = (option.format(tree=tree) for option in self.options)
        return [str(tree / LOADER), "--library-path", str(tree), str(tree / (program or self.programs[0])), *options]


QEMU: Final = Programs("qemu", "qemu-system-arm", ("qemu-system-aarch64",))
PASST: Final = Programs("passt", "passt", ("passt",))
GDB: Final = Programs(
    "gdb", "gdb-multiarch", ("gdb-multiarch",), "usr/share/gdb", ("--data-directory", "{tree}/usr/share/gdb")
)
E2FSPROGS: Final = Programs("e2fsprogs", "e2fsprogs", ("mke2fs", "e2fsck", "debugfs"))

RECIPES: Final[Mapping[str, Callable[[], Recipe]]] = {
    programs.name: programs.recipe for programs in (QEMU, PASST, GDB, E2FSPROGS)
}


def launcher(programs: Programs, program: str) -> str:
    """Return a script that runs one of the programs relative to the script's directory."""
    options = "".join(f' "{option.format(tree="$tree")}"' for option in programs.options)
    return LAUNCHER.format(loader=LOADER, program=program, options=options)


def _make(programs: Programs, scratch: Scratch, progress: Progress) -> str:
    require_for_packages(f"{programs.name} for the lab")
    with scratch.cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(scratch.cache.apt, SUITES[DEFAULT], refresh=False, progress=progress)
        progress("resolving packages", 0.0)
        packages = apt.locate(apt.resolve(programs.package))
        apt.archives = scratch.downloads
        (scratch.downloads / "partial").mkdir(exist_ok=True)
        apt.download(packages, progress)
    for number, package in enumerate(packages):
        progress(f"unpacking {programs.name}", number / len(packages))
        _unpack(scratch.downloads / package.file, programs, scratch)
    progress("choosing libraries", 0.0)
    for path in _needed(programs, scratch.work):
        shutil.copy(path, scratch.tree)
    (scratch.tree / BIN).mkdir()
    for program in programs.programs:
        path = scratch.tree / BIN / program
        path.write_text(launcher(programs, program))
        path.chmod(0o755)
    return next(f"{package.name} {package.version}" for package in packages if package.name == programs.package)


def _unpack(package: Path, programs: Programs, scratch: Scratch) -> None:
    """Unpack a package's programs and libraries into one directory, and its data to their paths in the tree."""
    wanted = re.compile(programs.wanted)
    with open_package(package) as tar:
        for member in tar:
            name = PurePosixPath(member.name.removeprefix("./"))
            if programs.data and name.is_relative_to(programs.data) and ".." not in name.parts:
                path = scratch.tree / name
                path.parent.mkdir(parents=True, exist_ok=True)
            elif wanted.fullmatch(str(name)):
                path = scratch.work / name.name
            else:
                continue
            if member.issym():
                path.unlink(missing_ok=True)
                path.symlink_to(Path(member.linkname).name)
            elif file := tar.extractfile(member):
                path.write_bytes(file.read())
                path.chmod(member.mode & 0o777)


def _needed(programs: Programs, directory: Path) -> list[Path]:
    """Return the names of the programs and of all libraries they need. Raises PyvmmError if one is missing."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    found: dict[str, Path] = {}
    wanted = [*programs.programs, LOADER]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = path = directory / name
        if not path.is_file():
            raise PyvmmError(
                f"{programs.package}'s packages lack {name}", hint="the archive has changed: please report this"
            )
        section = ELFFile(BytesIO(path.read_bytes())).get_section_by_name(".dynamic")
        if isinstance(section, DynamicSection):
            wanted += [tag.needed for tag in section.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
    return list(found.values())
