# SPDX-License-Identifier: Apache-2.0
"""The law of the house: which package may import which, and that no imports go in a circle.

A package imports only packages on lines below its own in ``LAYERS``. Packages on one line are siblings: they never
import each other. Imports for type checkers and imports inside functions count like any other. An exception stands in
``CIRCLES`` with its reason; there is no exception to the layers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    ("__main__",),
    ("cli",),
    ("atlas", "bench"),
    ("session",),
    ("experiment",),
    ("reports",),
    ("options", "probes"),
    ("lab", "debug", "observe"),
    ("machine",),
    ("vcpu", "guest"),
    ("devices",),
    ("memory",),
    ("kvm",),
    ("uapi", "payloads", "_native", "_native_source"),
    ("log",),
    ("outlet", "plugins", "syntax"),
    ("errors", "protection", "abi", "cpio", "interrupt", "labenv"),
    ("",),  # pyvmm itself, which has the version
)

CIRCLES: Mapping[frozenset[str], str] = {
    frozenset({"kvm.guest_memfd", "kvm.system", "kvm.vcpu", "kvm.vm"}): (
        "each descriptor of KVM keeps the one it was made from open, so both sides name each other's type"
    ),
}
"""Circles of modules that may stay, each with the reason."""


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the package by its name, without the leading ``pyvmm.``."""
    found = {}
    for path in sorted((root / "pyvmm").rglob("*.py*")):
        if path.suffix in (".py", ".pyi"):
            parts = path.relative_to(root / "pyvmm").with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Yield (module of pyvmm, line) of every import in ``source``, wherever in it that stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "pyvmm":
                    yield alias.name.partition(".")[2], node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pyvmm":
            package = (node.module or "").partition(".")[2]
            for alias in node.names:
                module = f"{package}.{alias.name}".lstrip(".")
                yield (module if module in known else package), node.lineno


def package(module: str) -> str:
    """Return the package, or the module beside the packages, that a module is of."""
    return module.partition(".")[0]


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return each import that runs up or to a sibling."""
    level = {name: number for number, line in enumerate(LAYERS) for name in line}
    found = []
    for module, source in sources.items():
        own = package(module)
        for target, line in imports(source, sources):
            other = package(target)
            if other != own and level[other] <= level[own]:
                way = "its sibling" if level[other] == level[own] else "up"
                found.append(f"{module}:{line} imports {way}: {target}")
    return found


def circles(sources: Mapping[str, str]) -> list[frozenset[str]]:
    """Return the strongly connected components of more than one module (Tarjan)."""
    # A package's own __init__ stands for a name that is none of its modules.
    graph = {module: {target for target, _ in imports(source, sources)} for module, source in sources.items()}
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for target in sorted(graph[module] & graph.keys()):
            if target not in numbers:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], numbers[target])
        if lowest[module] == numbers[module]:
            component = frozenset(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(component)

    for module in sorted(graph):
        if module not in numbers:
            visit(module)
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: path.read_text() for module, path in modules(ROOT).items()}


def test_every_package_has_a_layer(sources: dict[str, str]) -> None:
    named = [name for line in LAYERS for name in line]
    assert {package(module) for module in sources} == set(named)
    assert len(named) == len(set(named))


def test_no_import_runs_up_or_to_a_sibling(sources: dict[str, str]) -> None:
    assert violations(sources) == []


def test_no_imports_go_in_a_circle_but_those_explained(sources: dict[str, str]) -> None:
    assert {frozenset(circle): CIRCLES.get(circle) for circle in circles(sources)} == CIRCLES


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("uapi.kvm", "import pyvmm.cli", "imports up: cli"),
        ("uapi.kvm", "from pyvmm.cli import main", "imports up: cli"),
        ("atlas.model", "def f():\n    from pyvmm.bench.model import Series", "imports its sibling: bench.model"),
        ("devices.base", "if TYPE_CHECKING:\n    from pyvmm.machine import irq", "imports up: machine.irq"),
    ],
)
def test_law_notices_an_import_that_breaks_it(sources: dict[str, str], module: str, line: str, said: str) -> None:
    before = violations(sources)
    [new] = [each for each in violations({**sources, module: f"{sources[module]}\n{line}\n"}) if each not in before]
    assert new.startswith(f"{module}:")
    assert new.endswith(said)


def test_law_notices_a_circle_that_is_new(sources: dict[str, str]) -> None:
    back = {**sources, "outlet": f"{sources['outlet']}\nfrom pyvmm import log\n"}  # log writes to an outlet
    assert [circle for circle in circles(back) if {"outlet", "log"} <= circle]
