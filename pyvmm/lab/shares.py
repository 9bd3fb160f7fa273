# SPDX-License-Identifier: Apache-2.0
"""Which of the workstation's directories the lab sees, and where.

The rule: a path means the same inside as outside. The project's tree, the current directory, and the directories of
files named on a command line are mounted at their own absolute paths. Copies of the packages whose plug-ins a
command needs are at ``PACKAGES``. Nothing else of the workstation is visible. A command's outputs must be visible
outside of the lab when it ends, so no path may lose them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import UsageError

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = Path("/pyvmm/site/pyvmm")
PACKAGES = Path("/pyvmm/packages")
"""Where the lab imports from what plug-ins were copied out of (see staging.py)."""

# Directories that the lab has itself, or that must not be hidden. Directories below them may be mounted.
RESERVED = frozenset(
    map(
        Path,
        (
            "/",
            "/bin",
            "/boot",
            "/dev",
            "/etc",
            "/lib",
            "/proc",
            "/pyvmm",
            "/run",
            "/sbin",
            "/sys",
            "/usr",
            "/usr/bin",
            "/usr/lib",
            "/usr/sbin",
            "/var",
        ),
    )
)


TEMPORARY = Path("/tmp")
NOWHERE = Path("/dev/null")  # the same on every machine


@dataclass(frozen=True, slots=True)
class Share:
    """``source`` on the workstation is ``target`` in the lab."""

    source: Path
    target: Path
    readonly: bool = False


def python_path() -> Path:
    """Return the directory from which the lab imports pyvmm."""
    return PACKAGE.parent if _is_checkout() else INSTALLED.parent


def _is_checkout() -> bool:
    return (PACKAGE.parent / "pyproject.toml").is_file()


def find_shares(cwd: Path, arguments: Sequence[str], outputs: Sequence[str] = ()) -> list[Share]:
    """Return the shares that a command in ``cwd`` with ``arguments`` needs to find its files, parents first.

    The tree, ``cwd`` and the directories of the files ``outputs`` are writable. Directories of other named files
    are read-only. Raises UsageError if a file cannot be made visible, or an output cannot be written.
    """
    wanted = {PACKAGE.parent: False} if _is_checkout() else {}
    if cwd not in RESERVED and not _covered(cwd, wanted):
        wanted[cwd] = False
    for directory in _written(cwd, outputs):
        if not _covered(directory, wanted):
            wanted[directory] = False
    for path in _named(cwd, arguments):
        directory = path if path.is_dir() else path.parent
        if _covered(directory, wanted):
            continue
        if directory not in RESERVED:
            wanted[directory] = True
        elif not path.is_dir():
            raise UsageError(
                f"{path} cannot be made visible in the lab: {directory} is a directory of its own there",
                hint="copy the file into the current directory",
            )
    sources = {path: (path, readonly) for path, readonly in wanted.items()}
    if not _is_checkout():
        sources[INSTALLED] = (PACKAGE, True)
    return [Share(source, target, readonly) for target, (source, readonly) in sorted(sources.items())]


def workstation_files(cwd: Path, command: Sequence[str]) -> list[str]:
    """Return the words of a command that name files of the workstation, for a command that is not a verb of pyvmm.

    What lies in a directory of the lab's own system is the lab's file, and its /tmp is the lab's directory.
    """
    found = []
    for word in command:
        paths = list(_named(cwd, [word]))
        if paths and not any(path == TEMPORARY or Path(*path.parts[:2]) in RESERVED for path in paths):
            found.append(word)
    return found


def _covered(path: Path, wanted: dict[Path, bool]) -> bool:
    return any(other in (path, *path.parents) for other in wanted)


def _written(cwd: Path, outputs: Sequence[str]) -> Iterator[Path]:
    """Return the directories of the outputs, and those of the targets of links."""
    for text in outputs:
        path = Path(os.path.abspath(cwd / text))
        if path == NOWHERE:
            continue
        what = f"the output file {text!r} cannot be written"
        if path.is_dir():
            raise UsageError(f"{what}: {path} is a directory")
        for directory in dict.fromkeys((path.parent, path.resolve().parent)):
            if not directory.is_dir():
                is_there = directory.exists()
                raise UsageError(
                    f"{what}: {directory} {'is not a directory' if is_there else 'does not exist'}",
                    hint=None if is_there else f"mkdir -p {shlex.quote(str(directory))}",
                )
            if directory in RESERVED:
                raise UsageError(
                    f"{what} from the lab: {directory} is a directory of its own there",
                    hint="name a file in the current directory, or in another one such as /tmp",
                )
            if not os.access(directory, os.W_OK | os.X_OK):
                raise UsageError(f"{what}: {directory} is not yours to write to")
            yield directory


def _named(cwd: Path, arguments: Sequence[str]) -> Iterator[Path]:
    """Return the existing files that the arguments name, and the targets of links among them.

    A name is the whole argument, or the part after ``=``, or either up to a comma: ``path=a.img,ro``.
    """
    for argument in arguments:
        texts = (argument, argument.partition("=")[2])
        for text in dict.fromkeys((*texts, *(text.partition(",")[0] for text in texts))):
            path = Path(os.path.abspath(cwd / text))
            if text and not text.startswith("-") and path != NOWHERE and path.exists():
                yield path
                yield path.resolve()
