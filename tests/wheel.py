# SPDX-License-Identifier: Apache-2.0
"""Builds pyvmm's wheels from a copy of the sources, and installs one as on a machine without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|c89|c99|clang|clang\+\+|tcc|ld|as)(-[\d.]+)?")
"""Names of programs that make machine code."""
OFFLINE = "after connection broken by"
"""What pip says when no package index answers."""


def copy_source(directory: Path) -> Path:
    """Copy the sources without build results below ``directory``, and return the copy."""
    copy = directory / "pyvmm"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for name in ("pyvmm", "native"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def hatch(source: Path, target: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Let hatchling build a ``target`` of the sources into ``out``."""
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def wheel_of(source: Path, out: Path, target: str = "wheel", **environment: str) -> Path:
    """Build a wheel of the sources into ``out``, and return it."""
    done = hatch(source, target, out, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def programs_without(names: re.Pattern[str], directory: Path) -> Path:
    """Make a directory for PATH, below ``directory``, with all programs but those of these names."""
    programs = directory / "programs"
    programs.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).glob("*"):
            if not names.fullmatch(program.name) and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    return programs


@dataclass(frozen=True)
class Installation:
    """An environment with pyvmm from a wheel, on a machine that has every program of this one but compilers."""

    prefix: Path
    programs: Path

    @classmethod
    def of(cls, wheel: Path, directory: Path) -> Installation:
        """Install ``wheel`` and what it depends on into a new environment below ``directory``.

        Dependencies come from the package index, as wheels only. The test is skipped where none answers, but not in CI.
        """
        made = cls(directory / "environment", programs_without(COMPILER, directory))
        subprocess.run([sys.executable, "-m", "venv", made.prefix], check=True)
        pip = made.run("python", "-m", "pip", "install", "--retries=1", "--only-binary=:all:", wheel)
        if OFFLINE in pip.stderr and pip.returncode and not os.environ.get("CI"):
            pytest.skip("no package index can be reached")
        assert pip.returncode == 0, pip.stdout + pip.stderr
        return made

    def run(self, program: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, beside it and not in the checkout."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = os.pathsep.join(map(str, (self.prefix / "bin", self.programs)))
        return subprocess.run(
            [self.prefix / "bin" / program, *map(str, words)],
            cwd=self.prefix.parent,
            env=kept | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
