"""Which of the workstation's directories the lab sees, and where.

The rule: a path means the same inside as outside. The project's tree, the current directory, and the directories of
files named on a command line are mounted at their own absolute paths; nothing else of the workstation is visible.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = Path("/pyvmm/site/pyvmm")

# What the lab has itself or must not be hidden. Directories below them may be mounted.
RESERVED = frozenset(
    map(Path, ("/", "/bin", "/dev", "/etc", "/lib", "/proc", "/pyvmm", "/run", "/sbin", "/sys", "/usr", "/usr/bin", "/usr/lib"))
)


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
    """Give what must be shared for a command run in ``cwd`` with ``arguments`` to find what it names.

    The tree and ``cwd`` are writable; directories of files that are merely named are not.
    """
    shares: list[Share] = []

    def add(source: Path, target: Path | None = None, *, readonly: bool = False) -> None:
        where = target or source
        if where in RESERVED or not source.is_dir():
            return
        if any(where == share.target or share.target in where.parents for share in shares):
            return
        # Nothing that is already there may be hidden by its parent: put the parent first instead.
        position = next((i for i, share in enumerate(shares) if where in share.target.parents), len(shares))
        shares.insert(position, Share(source, where, "", readonly))

    if _is_checkout():
        add(PACKAGE.parent)
    else:
        add(PACKAGE, INSTALLED, readonly=True)
    add(cwd)
    for argument in arguments:
        for text in {argument, argument.rpartition("=")[2]}:
            path = Path(os.path.abspath(cwd / text))
            if text and not text.startswith("-") and path.exists():
                for named in (path, path.resolve()):
                    add(named if named.is_dir() else named.parent, readonly=True)
    return [Share(share.source, share.target, f"share{i}", share.readonly) for i, share in enumerate(shares)]
