# SPDX-License-Identifier: Apache-2.0
"""Tests import their helpers in one way: by the full name, from the root of the tree.

If one test imports a helper as ``rig`` and another as ``tests.rig``, it is loaded twice. Its classes exist twice,
and so does its state: ``isinstance`` fails between two tests' objects for no visible reason.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELPER = "tests.memory_helper"


def bare_imports(source: str, names: Container[str | None]) -> list[str]:
    """Return the modules that ``source`` imports by the last part of their name alone, or relatively."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in names]
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module in names):
            found.append("." * node.level + (node.module or ""))
    return found


def loaded_twice(modules: Mapping[str, ModuleType]) -> dict[str, list[str]]:
    """Return the files of tests/ that are loaded under several names, with those names."""
    names: dict[str, list[str]] = {}
    for name, module in modules.items():
        path = getattr(module, "__file__", None)
        if path is not None and Path(path).is_relative_to(ROOT / "tests"):
            names.setdefault(path, []).append(name)
    return {path: several for path, several in names.items() if len(several) > 1}


@pytest.fixture(scope="module")
def helpers() -> set[str]:
    """Return the last parts of the names of all modules and packages in tests/."""
    paths = [path for path in (ROOT / "tests").rglob("*") if path.suffix == ".py" or path.is_dir()]
    return {path.stem for path in paths} - set(sys.stdlib_module_names)


def test_every_import_of_a_helper_names_it_in_full(helpers: set[str]) -> None:
    bare = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (found := bare_imports(path.read_text(), helpers))
    }
    assert bare == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import memory_helper as helper", ["memory_helper"]),
        ("from memory_helper import BASE", ["memory_helper"]),
        ("def f():\n    from plain_guest import BASE", ["plain_guest"]),
        ("from .plain_guest import BASE", [".plain_guest"]),
        ("from tests.unit.plain_guest import BASE", []),
        ("from tests.unit import plain_guest", []),
        ("import pyvmm.memory", []),
    ],
)
def test_a_bare_import_is_noticed(helpers: set[str], line: str, found: list[str]) -> None:
    assert bare_imports(line, helpers) == found


def test_no_module_is_loaded_under_two_names() -> None:
    assert loaded_twice(sys.modules) == {}


def test_a_module_loaded_under_a_second_name_is_noticed() -> None:
    __import__(HELPER)
    path = str(ROOT / "tests" / "memory_helper.py")
    spec = importlib.util.spec_from_file_location("memory_helper", path)
    assert spec is not None
    again = importlib.util.module_from_spec(spec)
    assert loaded_twice({**sys.modules, "memory_helper": again}) == {path: [HELPER, "memory_helper"]}
