# SPDX-License-Identifier: Apache-2.0
"""Copy the packages of a command's plug-ins into a directory that the lab can see.

A lab cannot import from the workstation's site-packages: code compiled for it would hide the lab's own. So each
package is copied separately, with its entry points and dependencies. Owns the directory while it is in use.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm import plugins
from pyvmm.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

INSTALLED = frozenset({"cffi", "pyelftools", "pytest", "pyvmm", "structlog"})
"""Packages that the lab has."""
INFO = ("METADATA", "entry_points.txt")
COMPILED = (".so", ".pyd")
EM_AARCH64 = 183
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@contextmanager
def staged(packages: Sequence[Distribution]) -> Iterator[Path | None]:
    """Yield a temporary directory that ``stage`` filled with ``packages``, or None if there are no packages."""
    if not packages:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="pyvmm-packages-") as name:
        stage(packages, Path(name))
        yield Path(name)


def stage(packages: Iterable[Distribution], directory: Path) -> None:
    """Copy ``packages``, and those that they depend on, into ``directory``.

    Raises UsageError for code compiled for a machine other than the lab's, and for a package without files.
    """
    done: set[str] = set(INSTALLED)
    todo = list(packages)
    while todo:
        package = todo.pop()
        name = _normal(plugins.package_name(package))
        if name in done:
            continue
        done.add(name)
        _copy(package, name, directory)
        todo += _required(package)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required(package: Distribution) -> Iterator[Distribution]:
    """Yield the installed dependencies of ``package``. For missing ones, the import gives a better error."""
    from importlib import metadata

    for requirement in package.requires or ():
        match = _NAME.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            yield metadata.distribution(match[0])
        except metadata.PackageNotFoundError:
            continue


def _copy(package: Distribution, name: str, directory: Path) -> None:
    files = dict(_files(package))
    if not files and _modules(package):
        raise UsageError(
            f"the package {name} cannot be shown to the lab: it has no files to import from",
            hint="install it with pip, or run on an arm64 host",
        )
    for target, source in files.items():
        if source.suffix in COMPILED and not _runs_in_lab(source):
            raise UsageError(
                f"the package {name} cannot be shown to the lab: {source} is compiled for another machine",
                hint="run this on an arm64 host that has the package installed",
            )
        (directory / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, directory / target)
    info = directory / f"{name.replace('-', '_')}-{package.version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    for part in INFO:
        if (text := package.read_text(part)) is not None:
            (info / part).write_text(text)


def _files(package: Distribution) -> Iterator[tuple[Path, Path]]:
    """Yield (path to import it by, file) of every file in a package.

    These are the files that the installer lists. If it lists none, they are whole modules: an editable install has them
    in the source tree.
    """
    from importlib import util

    listed = set()
    for path in package.files or ():
        source = Path(str(package.locate_file(path)))
        top = path.parts[0]
        if top == ".." or path.is_absolute() or top.endswith((".dist-info", ".pth")) or "__pycache__" in path.parts:
            continue
        if source.is_file():
            listed.add(top.partition(".")[0])
            yield Path(*path.parts), source
    for module in _modules(package) - listed:
        spec = util.find_spec(module)
        if spec is None:
            continue
        for place in spec.submodule_search_locations or ():
            for source in sorted(Path(place).rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    yield Path(module) / source.relative_to(place), source
        if not spec.submodule_search_locations and spec.origin is not None and Path(spec.origin).is_file():
            yield Path(Path(spec.origin).name), Path(spec.origin)


def _modules(package: Distribution) -> set[str]:
    """Return the top-level modules of a package's plug-ins, or those it declares, except pyvmm itself."""
    groups = (plugins.DEVICES, plugins.CLAIMS, plugins.CASES)
    named = {entry.module.partition(".")[0] for entry in package.entry_points if entry.group in groups}
    return (named | set((package.read_text("top_level.txt") or "").split())) - {"pyvmm"}


def _runs_in_lab(path: Path) -> bool:
    """Return whether an ELF file is for the lab's processor."""
    with path.open("rb") as file:
        head = file.read(20)
    return head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == EM_AARCH64
