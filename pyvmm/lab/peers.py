# SPDX-License-Identifier: Apache-2.0
"""Build or fetch what benchmark peers and tests need on the workstation before a lab boots, once, and keep it.

``prepare`` returns the directories to make visible in the lab, and the variables that point to them: trees by
name (``trees.find_tree``), their programs on PATH. On arm64 hardware the same trees serve the machine itself.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.guest.kernels import DEBIAN, OWN, is_kernel
from pyvmm.lab import guests, kvmtool, programs, selftests
from pyvmm.lab.apt import Progress, silent
from pyvmm.lab.cache import Cache
from pyvmm.lab.lab import PATH
from pyvmm.lab.ownkernel import CROSS, compiler_version
from pyvmm.lab.programs import BIN
from pyvmm.lab.trees import Recipe, Scratch, digest_of, made_tree
from pyvmm.labenv import TREES

LOOP = "loop"
LOOP_SOURCE = Path(__file__).parents[1] / "bench" / "peers" / "bare_loop.c"
LOOP_LIBRARY = "bare_loop.so"
LOOP_FLAGS = ("-O2", "-Wall", "-Wextra", "-fPIC", "-shared")


def loop_recipe() -> Recipe:
    """Tell how the bare loop is made here. HostError where there is no compiler."""
    return Recipe(LOOP, digest_of(LOOP_SOURCE.read_text(), LOOP_FLAGS, compiler_version()), _make_loop)


def _make_loop(scratch: Scratch, _progress: Progress) -> str:
    command = [f"{CROSS}gcc", *LOOP_FLAGS, "-o", str(scratch.tree / LOOP_LIBRARY), str(LOOP_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"the bare loop does not compile:\n{done.stderr}", hint="apt install libc6-dev-arm64-cross")
    return LOOP_SOURCE.name


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    LOOP: loop_recipe,
    selftests.NAME: selftests.recipe,
    programs.QEMU.name: programs.QEMU.recipe,
    kvmtool.NAME: kvmtool.recipe,
    OWN: guests.RECIPES[OWN],
}
"""What the benchmark's peers need."""
ALL: Mapping[str, Callable[[], Recipe]] = {**RECIPES, **programs.RECIPES, **guests.RECIPES}
"""Everything that can be asked for by name; guests' kernels by what ``pyvmm run`` calls them."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Trees by their own name, and by what was asked for why there is none where one could not be made."""

    trees: dict[str, Path]
    lacking: dict[str, str]

    @property
    def paths(self) -> list[str]:
        """Return the directories to make visible: ``arguments`` of a Lab."""
        return [str(path) for path in self.trees.values()]

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment that a command in the lab needs."""
        bins = [str(path / BIN) for path in self.trees.values() if (path / BIN).is_dir()]
        return {
            TREES: os.pathsep.join(f"{name}={path}" for name, path in self.trees.items()),
            **({"PATH": os.pathsep.join([*bins, PATH])} if bins else {}),
        }


def prepare(
    names: Iterable[str] = tuple(RECIPES), *, progress: Progress = silent, cache: Cache | None = None
) -> Prepared:
    """Make the missing trees of these names. One that cannot be made is left out, with the reason.

    The trees of the peers take about two minutes and 200 MB of downloads, and 70 MB on the disk. A
    program from Debian takes seconds, a guest's kernel no time. Raises KeyError for a name that is not in ``ALL``.
    """
    prepared = Prepared({}, {})
    for name in names:
        try:
            prepared.trees.update(require([name], progress=progress, cache=cache).trees)
        except PyvmmError as error:
            prepared.lacking[name] = str(error)
    return prepared


def check(names: Iterable[str]) -> None:
    """Raise UsageError for a name that is not in ``ALL``."""
    for name in names:
        if is_kernel(name):
            guests.suite_of(name)
        elif name not in ALL:
            known = ", ".join((*programs.RECIPES, kvmtool.NAME))
            raise UsageError(
                f"nothing that a lab can be shown is called {name!r}",
                hint=f"there are {known}, and guests' kernels as {DEBIAN} and {OWN}",
            )


def require(names: Iterable[str], *, progress: Progress = silent, cache: Cache | None = None) -> Prepared:
    """Make the missing trees of these names. Raises PyvmmError if one cannot be made."""
    recipes = [ALL[name]() for name in names]
    return Prepared({recipe.name: made_tree(recipe, progress=progress, cache=cache) for recipe in recipes}, {})


def joined(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of both; lists that are in both are joined."""
    both = {name: os.pathsep.join((one[name], other[name])) for name in one.keys() & other.keys()}
    return {**one, **other, **both}
