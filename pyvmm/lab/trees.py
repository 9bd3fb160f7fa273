# SPDX-License-Identifier: Apache-2.0
"""Trees of programs that a lab's image lacks. They are made once on the workstation and shown to a lab.

``peers/NAME/`` in the lab's cache holds ``KEY/`` (immutable once there, named by what it was made of) and ``current``,
a link to one of them. Everything appears by rename. A process that makes a tree holds ``peers.lock``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.lab.apt import Progress, silent
from pyvmm.lab.cache import GRACE_SECONDS, Cache
from pyvmm.labenv import MANIFEST, given_tree
from pyvmm.syntax.foreign import load_json

HOME = "peers"
CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Scratch:
    """Directories to make a tree in: ``tree`` becomes the tree, ``work`` is removed, ``downloads`` stays."""

    cache: Cache
    tree: Path
    work: Path
    downloads: Path
    log: Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tree is made. ``digest`` covers its inputs except downloads; ``make`` returns what was downloaded."""

    name: str
    digest: str
    make: Callable[[Scratch, Progress], str]


def digest_of(*parts: object) -> str:
    """Hash the inputs of a tree."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def usable_tree(recipe: Recipe, cache: Cache | None = None) -> Path | None:
    """Return the directory of the tree if this recipe made it and it has all its files."""
    try:
        directory = (_home(cache or Cache(), recipe) / CURRENT).resolve(strict=True)
        manifest = load_json((directory / MANIFEST).read_text())
        whole = all((directory / name).stat().st_size == size for name, size in manifest["files"].items())
        return directory if whole and manifest["recipe"] == recipe.digest else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # missing, damaged, or not a manifest
        return None


def find_tree(name: str) -> Path | None:
    """Return the directory of a tree: from the environment, or else from this user's cache, made by any recipe."""
    if path := given_tree(name):
        return Path(path)
    directory = Cache().directory / HOME / name / CURRENT
    return directory.resolve() if (directory / MANIFEST).is_file() else None


def made_tree(recipe: Recipe, *, progress: Progress = silent, cache: Cache | None = None) -> Path:
    """Return the directory of the tree. If none was made by this recipe, make it. Raises PyvmmError if that fails."""
    cache = cache or Cache()
    if directory := usable_tree(recipe, cache):
        return directory
    with cache.lock(lambda: progress(f"waiting for another build of {recipe.name}", 0.0), "peers.lock"):
        if directory := usable_tree(recipe, cache):  # made by the process that held the lock
            return directory
        try:
            return _make(recipe, cache, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PyvmmError(
                f"no space left in {cache.directory} for {recipe.name}",
                hint="free about 600 MB there, or set XDG_CACHE_HOME to a larger place",
            ) from error


def _home(cache: Cache, recipe: Recipe) -> Path:
    return cache.directory / HOME / recipe.name


def _make(recipe: Recipe, cache: Cache, progress: Progress) -> Path:
    home = _home(cache, recipe)
    downloads = cache.directory / HOME / "downloads" / recipe.name
    for directory in (home, downloads):
        directory.mkdir(parents=True, exist_ok=True)
    with cache.scratch("peers-partial") as scratch:
        tree, work = scratch / "tree", scratch / "work"
        tree.mkdir()
        work.mkdir()
        source = recipe.make(Scratch(cache, tree, work, downloads, home / "build.log"), progress)
        files = {str(path.relative_to(tree)): path.stat().st_size for path in sorted(tree.rglob("*")) if path.is_file()}
        manifest = {"recipe": recipe.digest, "source": source, "files": files}
        (tree / MANIFEST).write_text(json.dumps(manifest, indent=1))
        directory = home / digest_of(recipe.digest, source)[:16]
        shutil.rmtree(directory, ignore_errors=True)  # damaged, if it is there
        tree.rename(directory)
    shutil.rmtree(downloads)  # kept until here: a build that failed need not fetch it again
    link = home / "current.new"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    link.replace(home / CURRENT)
    for other in home.iterdir():
        old = not other.is_symlink() and other.is_dir() and time.time() - other.stat().st_mtime > GRACE_SECONDS
        if old and other != directory:
            shutil.rmtree(other, ignore_errors=True)  # no lab can be starting from it
    return directory
