# SPDX-License-Identifier: Apache-2.0
"""The architecture: which package may import which, and that imports form no circle.

A package imports only packages of layers below its own. Packages of one layer are siblings: they never import each
other. Imports for type checkers, imports inside functions, and modules that are asked for by name (``import_module``)
count like any other. An exception stands in ``CIRCLES`` with its reason; there is no exception to the layers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOUSE = """
__main__        python -m pyvmm

cli             verbs: what each command does, and no more
examples        a device and short experiments, a file each

atlas           what the kernel does with guest memory, claim by claim
bench           what it costs, case by case

session         a run with all that watches it

experiment      a guest under a script, and the host's side of it

reports         what all HTML, text and SVG reports share

options         what a command line or a TOML file says about a guest
probes          what this host can do

lab             a pKVM host under QEMU
debug           a debugger's way into a guest
observe         what can be seen of a run

machine         one VM put together, from its start to its end

vcpu            a vCPU's thread, and what its exits mean
guest           what runs inside: kernels, initramfs, the puppet

devices         what the guest talks to

memory          guest memory, its ledger, and the share relay

confine         what a process with a guest may ask of the kernel
kvm             the descriptors behind /dev/kvm
_native_source  whether the run loop is built from these sources

uapi            the kernel's interface as data
payloads        built-in guests
_native         the run loop in C

log             events

outlet          output that never waits for its reader
plugins         what other installed packages bring
syntax          how an option is declared

errors          what is raised
protection      who keeps a guest's memory from the host
schema          whether JSON values have the shape that they must have
abi             what payloads and host agree on
cpio            the archives that initramfs are
interrupt       how a signal ends the program
labenv          whether this is a lab
pages           the sizes of pages
terminal        whose a terminal is, and what may be shown on it
typed           what typing has, without its import

pyvmm           the version
"""
"""Every package and every module beside the packages, a line each; a blank line ends a layer."""

LAYERS = tuple(tuple(line.split()[0] for line in layer.splitlines()) for layer in HOUSE.strip().split("\n\n"))

CIRCLES: Mapping[frozenset[str], str] = {
    frozenset({"pyvmm.kvm.guest_memfd", "pyvmm.kvm.system", "pyvmm.kvm.vcpu", "pyvmm.kvm.vm"}): (
        "each descriptor of KVM keeps the one it was made from open, so both sides name each other's type"
    ),
    frozenset({"pyvmm.observe.grid", "pyvmm.observe.mapsvg", "pyvmm.observe.pagemap"}): (
        "a notebook asks a page map for its picture; the map imports what draws it at that call only"
    ),
    frozenset(
        {
            "pyvmm.atlas.model",
            "pyvmm.atlas.report.evidence",
            "pyvmm.atlas.report.figures",
            "pyvmm.atlas.report.notebook",
            "pyvmm.atlas.report.wording",
        }
    ): "a notebook asks a result for its HTML; the result imports what writes it at that call only",
}
"""Circles of modules that may stay, each with the reason."""


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the package by its name."""
    found = {}
    for path in sorted((root / "pyvmm").rglob("*.py*")):
        if path.suffix in (".py", ".pyi"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def asked(source: str) -> tuple[tuple[str, tuple[str, ...], int], ...]:
    """Return (module of pyvmm, names taken from it, line) of every import anywhere in ``source``."""
    found: list[tuple[str, tuple[str, ...], int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports name the whole path"
            found.append((node.module or "", tuple(alias.name for alias in node.names), node.lineno))
    return tuple(each for each in found if package(each[0]))


@cache
def named(source: str) -> tuple[tuple[str, int], ...]:
    """Return (module of pyvmm, line) of every module imported by name, if the name is a literal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(first, ast.Constant) and package(str(first.value)):
                found.append((str(first.value).rstrip("."), node.lineno))
    return tuple(found)


def imports(source: str, known: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Yield (module of pyvmm, line) of every import; a name taken from a package may be a module of it."""
    for module, names, line in asked(source):
        if not names:
            yield module, line
        for name in names:
            yield (f"{module}.{name}" if f"{module}.{name}" in known else module), line


def package(module: str) -> str:
    """Return the package or top-level module of pyvmm that contains a module; empty for foreign modules."""
    parts = module.split(".")
    return "" if parts[0] != "pyvmm" else parts[1] if parts[1:] else "pyvmm"


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return each import that runs up or to a sibling."""
    level = {name: number for number, line in enumerate(LAYERS) for name in line}
    found = []
    for module, source in sources.items():
        own = package(module)
        for target, line in (*imports(source, sources), *named(source)):
            other = package(target)
            if other != own and level[other] <= level[own]:
                way = "its sibling" if level[other] == level[own] else "up"
                found.append(f"{module}:{line} imports {way}: {target}")
    return found


def circles(sources: Mapping[str, str]) -> list[frozenset[str]]:
    """Return the strongly connected components of more than one module (Tarjan)."""
    # A name that is not a module of the package is from its __init__.
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


def test_imports_form_no_circle_except_those_explained(sources: dict[str, str]) -> None:
    assert {frozenset(circle): CIRCLES.get(circle) for circle in circles(sources)} == CIRCLES


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("uapi.kvm", "import pyvmm.cli", "imports up: pyvmm.cli"),
        ("uapi.kvm", "from pyvmm.cli import main", "imports up: pyvmm.cli"),
        ("uapi.kvm", "from pyvmm import cli", "imports up: pyvmm.cli"),
        ("kvm.vm", "import_module('pyvmm.machine')", "imports up: pyvmm.machine"),
        ("kvm.vm", "importlib.import_module(f'pyvmm.cli.{verb}')", "imports up: pyvmm.cli"),
        ("atlas.model", "def f():\n    from pyvmm.bench.model import Series", "imports its sibling: pyvmm.bench.model"),
        ("devices.base", "if TYPE_CHECKING:\n    from pyvmm.machine import irq", "imports up: pyvmm.machine.irq"),
        ("errors", "from pyvmm.abi import STRIDE", "imports its sibling: pyvmm.abi"),
    ],
)
def test_violations_finds_an_import_that_breaks_the_rules(
    sources: dict[str, str], module: str, line: str, said: str
) -> None:
    module = f"pyvmm.{module}"
    before = violations(sources)
    [new] = [each for each in violations({**sources, module: f"{sources[module]}\n{line}\n"}) if each not in before]
    assert new.startswith(f"{module}:")
    assert new.endswith(said)


def test_imports_without_the_whole_path_are_refused() -> None:
    with pytest.raises(AssertionError, match="line 2: imports name the whole path"):
        list(imports("import os\nfrom . import errors\n", {}))


@pytest.mark.parametrize(
    ("module", "line", "others"),
    [
        ("outlet", "from pyvmm import log", {"log"}),
        ("outlet", "def f():\n    from pyvmm.log import get_logger", {"log"}),
        ("kvm.fd", "import pyvmm.kvm.vm", {"kvm.vm"}),
    ],
)
def test_circles_finds_a_new_circle(sources: dict[str, str], module: str, line: str, others: set[str]) -> None:
    module, names = f"pyvmm.{module}", {f"pyvmm.{other}" for other in others}
    assert not [circle for circle in circles(sources) if {module, *names} <= circle]
    back = {**sources, module: f"{sources[module]}\n{line}\n"}
    assert [circle for circle in circles(back) if {module, *names} <= circle]
