# SPDX-License-Identifier: Apache-2.0
"""The linters and type checkers report nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from native import build
from pyvmm.lab.cache import Cache, cache_directory

ROOT = Path(__file__).resolve().parents[2]


def check(*command: str | Path, **environment: str) -> None:
    env = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def module(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (it is in the dev dependencies)")
    return name


def test_mypy_reports_nothing() -> None:
    # Its cache is keyed by the hash of each source, so checkouts share it, but only one run may use it at a time.
    cache = Cache(cache_directory().with_name("tests"))
    with cache.lock(lambda: None, "mypy.lock"):
        check(sys.executable, "-m", module("mypy"), "--cache-dir", cache.directory / "mypy")


def test_pyright_reports_nothing() -> None:
    # Most of its objects die young: a larger heap for them saves a tenth of its time.
    room = "--max-semi-space-size=256"
    check(sys.executable, "-m", module("pyright"), "--pythonpath", sys.executable, NODE_OPTIONS=room)


def test_ruff_reports_nothing() -> None:
    check(sys.executable, "-m", module("ruff"), "check", "--no-cache", ".")


def test_ruff_would_change_no_format() -> None:
    check(sys.executable, "-m", module("ruff"), "format", "--check", "--no-cache", ".")


def test_only_tables_of_constants_are_formatted_by_hand() -> None:
    # ruff does not report how often it is disabled.
    mark = "fmt: " + "skip"
    places = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts for line in path.open() if mark in line]
    assert 0 < len(places) <= 40


SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCES = {".c", ".h", ".ld", ".py", ".pyi", ".S", ".sh"}


def test_every_source_names_its_licence() -> None:
    sources = [path for path in ROOT.rglob("*") if path.suffix in SOURCES and not {".venv", ".git"} & set(path.parts)]
    sources += [ROOT / ".run", ROOT / ".ci/run", ROOT / ".ci/nightly"]
    assert len(sources) > 500
    assert [path for path in sources if SPDX not in path.read_text()[:120]] == []


@pytest.mark.parametrize("machine", build.MACHINES)
def test_the_compiler_and_its_analyzer_report_nothing(machine: str, tmp_path: Path) -> None:
    cc = build.compiler(machine)
    if cc is None:
        pytest.skip(f"no C compiler for {machine}")
    if "Free Software Foundation" not in subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout:
        pytest.skip(f"{cc[0]} is not gcc: it has no -fanalyzer")
    own = [*build.COMMON, *build.STRICT, "-fanalyzer", "-Wshadow", "-Wstrict-prototypes", '-DPV_SOURCE_HASH=""']
    for source in build.c_files():
        check(*cc, *own, f"-I{build.NATIVE}", "-c", source, "-o", tmp_path / "out.o")


def test_the_loop_neither_allocates_nor_uses_python() -> None:
    text = "".join(path.read_text() for path in build.NATIVE.glob("*/*.[ch]"))
    for word in ("Python.h", "alloc(", "alloca(", "free("):
        assert word not in text
