# SPDX-License-Identifier: Apache-2.0
"""kvmtool (lkvm), built from the source in Ubuntu 22.04: linked statically, with Debian's libfdt.

No Debian release has it, and no later Ubuntu release. The files of that release no longer change, so the source
is named by its hash.
"""

from __future__ import annotations

import hashlib
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Final

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress, updated_apt
from pyvmm.lab.kbuild import SourceTree
from pyvmm.lab.needs import require_for_make
from pyvmm.lab.ownkernel import CROSS, SUITES, compiler_version
from pyvmm.lab.programs import BIN
from pyvmm.lab.rootfs import open_package
from pyvmm.lab.trees import Recipe, Scratch, digest_of

NAME: Final = "kvmtool"
PROGRAM: Final = "lkvm"
SOURCE: Final = "http://archive.ubuntu.com/ubuntu/pool/universe/k/kvmtool/kvmtool_0.20170904.orig.tar.xz"
SHA256: Final = "5a70657add5663391f689f3dc43393093abddb28df0543229498b01fe0fdbaa5"
TARGET: Final = "lkvm-static"
LIBFDT: Final = "libfdt-dev"
WANTED: Final = (".h", ".a")
"""How the files end that are taken of libfdt's package."""
VARIABLES: Final = {"ARCH": "arm64", "CROSS_COMPILE": CROSS, "WERROR": "0"}
SECONDS: Final = 60.0


class KvmtoolTree(SourceTree):
    """kvmtool's source."""

    made = NAME


def recipe() -> Recipe:
    """Return the recipe of the tree of kvmtool. Raises HostError without a compiler."""
    return Recipe(NAME, digest_of(SHA256, VARIABLES, TARGET, PROGRAM, compiler_version()), _make)


def _make(scratch: Scratch, progress: Progress) -> str:
    require_for_make(NAME)
    progress("kvmtool's source", 0.0)
    source = _fetched()
    with scratch.cache.lock(lambda: progress("waiting for another build", 0.0)):
        apt = updated_apt(scratch.cache.apt, SUITES, refresh=False, progress=progress)
        [package] = apt.locate([each for each in apt.resolve(LIBFDT) if each[0] == LIBFDT])
        apt.archives = scratch.downloads
        (scratch.downloads / "partial").mkdir(exist_ok=True)
        apt.download([package], progress)
    library = scratch.work / "libfdt"
    library.mkdir()
    _unpack(scratch.downloads / package.file, library)
    with tarfile.open(fileobj=BytesIO(source)) as tar:
        tar.extractall(scratch.work, filter="data")
    [directory] = scratch.work.glob("kvmtool-*")
    progress("compiling kvmtool", 0.0)
    scratch.log.write_text(f"{SOURCE}, {package.name} {package.version}, {compiler_version()}\n")
    tree = KvmtoolTree(directory, scratch.log, VARIABLES)
    tree.make(TARGET, {"CC": f"{CROSS}gcc -s -I{library} -L{library}"})
    (scratch.tree / BIN).mkdir()
    (directory / TARGET).rename(scratch.tree / BIN / PROGRAM)
    return SOURCE.rpartition("/")[2]


def _fetched() -> bytes:
    """Fetch the source. Raises PyvmmError if that fails, or if its hash is wrong."""
    import urllib.request  # it imports many modules, and a tree is made once

    try:
        with urllib.request.urlopen(SOURCE, timeout=SECONDS) as answer:
            source: bytes = answer.read()
    except OSError as error:
        raise PyvmmError(f"kvmtool's source cannot be fetched: {error}", hint=f"it is needed once: {SOURCE}") from error
    if hashlib.sha256(source).hexdigest() != SHA256:
        raise PyvmmError(f"{SOURCE} is not what it was", hint="the archive has changed: please report this")
    return source


def _unpack(package: Path, directory: Path) -> None:
    """Unpack headers and the library from libfdt's package."""
    with open_package(package) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.suffix in WANTED and (file := tar.extractfile(member)):
                (directory / name.name).write_bytes(file.read())
