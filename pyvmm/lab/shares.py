"""Which of the workstation's directories the lab sees, and where.

The rule: a path means the same inside as outside. The project's tree, the current directory, and the directories of
files named on a command line are mounted at their own absolute paths; nothing else of the workstation is visible.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import UsageError

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = Path("/pyvmm/site/pyvmm")

# What the lab has itself or must not be hidden. Directories below them may be mounted.
RESERVED = frozenset(map(Path, (
    "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/pyvmm", "/run", "/sbin", "/sys",
    "/usr", "/usr/bin", "/usr/lib", "/usr/sbin", "/var",
)))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Share:
    """``source`` on the workstation is ``target`` in the lab."""

    source: Path
    target: Path
    tag: str
    readonly: bool = False


def python_path() -> Path:
    """Give the directory from which the lab imports pyvmm."""
    return PACKAGE.parent if _is_checkout() else INSTALLED.parent


def _is_checkout() -> bool:
    return (PACKAGE.parent / "pyproject.toml").is_file()


def find_shares(cwd: Path, arguments: list[str]) -> list[Share]:
    """Give what must be shared for a command run in ``cwd`` with ``arguments`` to find what it names, parents first.

    The tree and ``cwd`` are writable; directories of files that are merely named are not. UsageError for a file that
    cannot be made visible.
    """
    wanted = {PACKAGE.parent: False} if _is_checkout() else {}
    if cwd not in RESERVED and not _covered(cwd, wanted):
        wanted[cwd] = False
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
    return [
        Share(source, target, f"share{number}", readonly)
        for number, (target, (source, readonly)) in enumerate(sorted(sources.items()))
    ]


def _covered(path: Path, wanted: dict[Path, bool]) -> bool:
    return any(other in (path, *path.parents) for other in wanted)


def _named(cwd: Path, arguments: list[str]) -> Iterator[Path]:
    """Give what exists of what the arguments name, as such or behind a ``=``, and what links among it lead to."""
    for argument in arguments:
        for text in dict.fromkeys((argument, argument.partition("=")[2])):
            path = Path(os.path.abspath(cwd / text))
            if text and not text.startswith("-") and path.exists():
                yield path
                yield path.resolve()
